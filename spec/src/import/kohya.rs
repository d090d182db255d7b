//! Keys of kohya's sd-scripts: `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`.

use super::{Format, Key, Name, Role};

const PREFIXES: [(&str, &str); 4] = [
    ("lora_unet_", "unet"),
    ("lora_te_", "text_encoder"),
    // Of models with two text encoders.
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
];

pub(super) fn parse(key: &str) -> Option<Key> {
    let (module, leaf) = key.split_once('.')?;
    let (part, path) = PREFIXES.iter().find_map(|(prefix, part)| Some((*part, module.strip_prefix(prefix)?)))?;
    let role = match leaf {
        "lora_down.weight" => Role::Down,
        "lora_up.weight" => Role::Up,
        "alpha" => Role::Alpha,
        _ => return None,
    };
    Some(Key { module: Name::Flat(part, path.to_owned()), role, format: Format::Kohya })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let key =
            |part, path: &str, role| Some(Key { module: Name::Flat(part, path.into()), role, format: Format::Kohya });
        assert_eq!(parse("lora_unet_mid_block_proj_in.alpha"), key("unet", "mid_block_proj_in", Role::Alpha));
        assert_eq!(parse("lora_te_text_model_x.lora_up.weight"), key("text_encoder", "text_model_x", Role::Up));
        assert_eq!(parse("lora_te1_x.lora_down.weight"), key("text_encoder", "x", Role::Down));
        assert_eq!(parse("lora_te2_x.lora_down.weight"), key("text_encoder_2", "x", Role::Down));
        for other in ["lora_unet_x.hada_w1_a", "lora_unet_x", "lora_x.alpha", "unet.x.alpha", ""] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
