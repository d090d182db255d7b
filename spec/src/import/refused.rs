//! Keys that have no counterpart in an adapter, and why.

/// A method, told by the endings of its keys.
pub(super) struct Method {
    endings: &'static [&'static str],
    /// What it is called.
    pub(super) name: &'static str,
    why: &'static str,
    /// Whether the factors beside such a key mean something else without it, so that it cannot be left out.
    pub(super) changes_the_rest: bool,
}

impl Method {
    pub(super) fn reason(&self) -> String {
        format!("{}: {}", self.name, self.why)
    }
}

const METHODS: &[Method] = &[
    Method {
        endings: &["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"],
        name: "DoRA",
        why: "it scales each row of the changed weight to a length of its own, which is no sum with B A; train it as \
              plain LoRA",
        changes_the_rest: true,
    },
    Method {
        endings: &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
        name: "LoHa",
        why: "its change is a product, element by element, of two low-rank matrices, which is not of low rank",
        changes_the_rest: false,
    },
    Method {
        endings: &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"],
        name: "LoKr",
        why: "its change is a Kronecker product, which is not of low rank",
        changes_the_rest: false,
    },
    Method {
        endings: &["oft_blocks", "oft_diag", "oft_r", "oft_R", "oft_R.weight", "oft_s", "boft_R", "boft_s"],
        name: "OFT",
        why: "it turns the weight instead of adding to it, so that its change depends on all others",
        changes_the_rest: false,
    },
    Method {
        endings: &["on_input", "ia3_l"],
        name: "IA3",
        why: "it scales the weight instead of adding to it, so that its change depends on all others",
        changes_the_rest: false,
    },
    Method {
        endings: &["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
        name: "GLoRA",
        why: "it multiplies the weight as well as adding to it, so that its change depends on all others",
        changes_the_rest: false,
    },
    Method {
        endings: &["lora_E", "lora_E.default", "vera_lambda_b", "vera_lambda_d"],
        name: "AdaLoRA or VeRA",
        why: "it has factors beside A and B; write it as plain LoRA first",
        changes_the_rest: true,
    },
    Method {
        endings: &["lora_mid.weight"],
        name: "a Tucker decomposition",
        why: "it is of a convolution, and adapters change Linears only",
        changes_the_rest: false,
    },
    Method {
        endings: &["diff", "diff_b", "w_norm", "b_norm", "set_weight"],
        name: "a full difference",
        why: "it is a whole weight, bias or norm, not factors of low rank",
        changes_the_rest: false,
    },
    Method {
        endings: &["lora_up.bias", "lora_down.bias", "lora_B.bias", "lora_B.default.bias"],
        name: "a bias",
        why: "adapters change weights only",
        changes_the_rest: false,
    },
    Method {
        endings: &["lora_embedding_A", "lora_embedding_B", "lora_embedding_A.default", "lora_embedding_B.default"],
        name: "LoRA of an embedding table",
        why: "adapters change Linears only",
        changes_the_rest: false,
    },
];

/// The method that `key` is of, if it is of one that has no counterpart.
pub(super) fn method(key: &str) -> Option<&'static Method> {
    let is = |ending: &&str| key.strip_suffix(ending).is_some_and(|module| module.ends_with('.') && module.len() > 1);
    METHODS.iter().find(|method| method.endings.iter().any(is))
}

/// Why the base model has no module for `key`, which is one of a LoRA.
pub(super) fn no_place(key: &str) -> &'static str {
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| key.starts_with(prefix));
    let sgm = ["lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"];
    let transformer = ["transformer.", "lora_transformer_", "lora_unet_double_blocks_", "lora_unet_single_blocks_"];
    if begins(&["lora_te2_", "text_encoder_2."]) {
        "it is for a second text encoder, as SDXL has, and the base model has one"
    } else if begins(&sgm) {
        "it is for a module of SDXL, and the base model is not SDXL"
    } else if begins(&transformer) || begins(&["lora_unet_joint_blocks_", "lora_te3_"]) {
        "it is for a diffusion transformer (Flux, SD 3), and the base model has a UNet"
    } else {
        "the base model has no such module: is this its base?"
    }
}

/// Why `key`, which is of no known form, is not applied.
pub(super) fn unknown(key: &str) -> &'static str {
    let whole = ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."];
    if whole.iter().any(|prefix| key.starts_with(prefix)) {
        "it is a weight of a whole model, not a change"
    } else {
        "not a key of kohya's, diffusers' or PEFT's LoRA, nor of a textual inversion"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_told_by_whole_endings() {
        let name = |key| method(key).map(|m| m.name);
        assert_eq!(name("lora_unet_x.hada_w1_a"), Some("LoHa"));
        assert_eq!(name("lycoris_x.lokr_w2"), Some("LoKr"));
        assert_eq!(name("lora_unet_x.oft_blocks"), Some("OFT"));
        assert_eq!(name("lora_unet_x.on_input"), Some("IA3"));
        assert_eq!(name("lora_unet_x.a1.weight"), Some("GLoRA"));
        assert_eq!(name("lora_unet_x.dora_scale"), Some("DoRA"));
        assert_eq!(name("unet.x.lora_magnitude_vector"), Some("DoRA"));
        assert_eq!(name("lora_unet_x.lora_mid.weight"), Some("a Tucker decomposition"));
        assert_eq!(name("lora_unet_x.diff"), Some("a full difference"));
        assert_eq!(name("lora_unet_x.diff_b"), Some("a full difference"));
        assert_eq!(name("x.lora_B.bias"), Some("a bias"));
        for other in ["lora_unet_x.lora_up.weight", "diff", ".diff", "x.ndiff", "unet.x.to_q.alpha", "<milo>"] {
            assert_eq!(name(other), None, "{other}");
        }
    }
}
