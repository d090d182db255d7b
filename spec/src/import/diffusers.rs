//! Keys of diffusers' own two forms: `unet.<path>.lora.down.weight` and `text_encoder.<path>.lora_linear_layer.up.weight`,
//! and the older `<path>.processor.to_q_lora.down.weight`, with or without `unet.` in front.

use super::{Format, Key, Name, Role};

pub(super) fn parse(key: &str) -> Option<Key> {
    let roles = [(".down.weight", Role::Down), (".up.weight", Role::Up), (".alpha", Role::Alpha)];
    let (module, role) = roles.into_iter().find_map(|(suffix, role)| Some((key.strip_suffix(suffix)?, role)))?;
    let path = match module.strip_suffix(".lora").or_else(|| module.strip_suffix(".lora_linear_layer")) {
        Some(path) => path.to_owned(),
        None => match old(module) {
            Some(path) => path,
            // An alpha beside the factors, as some tools put it into files of this form and of PEFT's.
            None if role == Role::Alpha && module.contains('.') => module.to_owned(),
            None => return None,
        },
    };
    Some(Key { module: Name::Dotted(path), role, format: Format::Diffusers })
}

/// The layer of `<path>.processor.to_q_lora`: attention processors had the factors of their four Linears, under the
/// UNet's names for these also in the text encoder.
fn old(module: &str) -> Option<String> {
    let (attention, linear) = module.rsplit_once('.')?;
    let linear = linear.strip_suffix("_lora")?;
    let attention = attention.strip_suffix(".processor").unwrap_or(attention);
    let linear = match (attention.ends_with(".self_attn"), linear) {
        (false, "to_out") => "to_out.0",
        (true, "to_q") => "q_proj",
        (true, "to_k") => "k_proj",
        (true, "to_v") => "v_proj",
        (true, "to_out") => "out_proj",
        (_, other) => other,
    };
    Some(format!("{attention}.{linear}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(key: &str, path: &str, role: Role) {
        let expected = Key { module: Name::Dotted(path.into()), role, format: Format::Diffusers };
        assert_eq!(parse(key), Some(expected), "{key}");
    }

    #[test]
    fn keys() {
        check("unet.a.attn1.to_q.lora.down.weight", "unet.a.attn1.to_q", Role::Down);
        check("unet.a.attn1.to_out.0.lora.up.weight", "unet.a.attn1.to_out.0", Role::Up);
        check("text_encoder.a.q_proj.lora_linear_layer.up.weight", "text_encoder.a.q_proj", Role::Up);
        check("unet.a.attn1.processor.to_q_lora.down.weight", "unet.a.attn1.to_q", Role::Down);
        check("a.attn2.processor.to_out_lora.up.weight", "a.attn2.to_out.0", Role::Up);
        check("text_encoder.a.self_attn.to_out_lora.up.weight", "text_encoder.a.self_attn.out_proj", Role::Up);
        check("text_encoder.a.self_attn.to_v_lora.down.weight", "text_encoder.a.self_attn.v_proj", Role::Down);
        check("unet.a.to_q.alpha", "unet.a.to_q", Role::Alpha);
        for other in ["alpha", "x.alpha.y", "unet.a.to_q.weight", "unet.a.down.weight", ".down.weight"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
