//! The layout of everything that crosses, pinned by `layout.golden`. With a new minor version a line may be added there,
//! or a function at the end of a table; what `layout-1.0.golden` has must stay as it was, else it is a new major version.

use std::fmt::Write;
use std::mem::{align_of, offset_of, size_of};

use super::instance::RawInstance;
use super::job::{JobTable, RawJob};
use super::magic::Magic;
use super::merge::MergeTable;
use super::root::PluginRoot;
use super::sample::{DenoiserTable, RawDenoiser, SampleTable};
use super::train::TrainTable;
use super::train_host::{RawTrainHost, TrainHostTable};
use super::types::*;

macro_rules! layouts {
    ($($type:ty { $($field:ident),* $(,)? })*) => {{
        let mut text = String::new();
        $(
            let name = stringify!($type).replace("<'static>", "");
            write!(text, "{name} size {} align {}:", size_of::<$type>(), align_of::<$type>()).expect("a string");
            $(write!(text, " {} {}", stringify!($field), offset_of!($type, $field)).expect("a string");)*
            text.push('\n');
        )*
        text
    }};
}

fn layouts() -> String {
    layouts! {
        Magic { word, length, abi_major, abi_minor, abi_stable, target, name }
        PluginRoot {
            name, version, manifest, schema, resolve, create, destroy, capability, merge, train, sample,
        }
        JobTable { progress, is_cancelled, log, seed, artefact }
        MergeTable { plan, fill }
        SampleTable { sample }
        DenoiserTable { predict, noise, step_done }
        TrainTable { plan, train }
        TrainHostTable {
            embedding, check_prompt, generate, loss_and_gradients, resume, step_done, drift_and_gradients,
        }
        RawInstance {}
        RawJob<'static> {}
        RawDenoiser<'static> { job, schedule, shape, context, table }
        RawTrainHost<'static> {
            job, concept, layers, captions, latent_shape, cross_attention_layers, num_train_timesteps, context, table,
        }
        RawError { code, message }
        RawLayer<'static> { name, rows, columns }
        RawFactors<'static> { a, b, rows, rank, scale }
        RawAdapter<'static> { name, digest, weight, factors }
        RawTerm { adapter, is_per_row, coefficient, per_row }
        RawLayerPlan { is_dense, terms, numbers }
        RawSchedule<'static> { alphas_cumprod, steps_offset, set_alpha_to_one, spacing }
        RawConcept<'static> { name, class_word, kind }
        RawPartition { scheme, capacity, seed, slot }
        RawTrainPlan {
            steps, checkpoint_every, rank, alpha, is_alpha_over_rank, partition, erasure_lambda, tokens,
        }
        RawLayerFactors<'static> { layer, rows, rank, scale, a, b, a_is_frozen }
        RawToken<'static> { name, layers, values }
        RawParameters<'static> { factors, tokens }
        OwnedLayerFactors { layer, rows, rank, scale, a, b, a_is_frozen }
        OwnedToken { name, layers, values }
        OwnedParameters { factors, tokens }
        RawState<'static> { step, parameters, optimiser }
        OwnedState { step, parameters, optimiser }
        RawSample<'static> {
            picture, placement_scale, placement_x, placement_y, flip, prompt, timestep, noise, posterior, weight,
        }
        RawStep<'static> { parameters, masks, batch, gradients }
        RawPictureRequest<'static> { prompt, count, steps, guidance_scale }
    }
}

#[test]
#[cfg(target_pointer_width = "64")]
fn is_that_of_this_version() {
    let golden = include_str!("layout.golden");
    println!("{}", layouts()); // shown when it fails
    for (now, then) in layouts().lines().zip(golden.lines()) {
        assert_eq!(now, then, "a layout that has shipped must not change");
    }
    assert_eq!(layouts().lines().count(), golden.lines().count(), "add new types to layout.golden");
}

#[test]
fn still_has_all_of_version_1_0() {
    let name = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let fields = |line: &str| line.split_once(": ").map_or(String::new(), |(_, fields)| fields.to_owned());
    let now: std::collections::HashMap<_, _> =
        include_str!("layout.golden").lines().map(|line| (name(line), line)).collect();
    for then in include_str!("layout-1.0.golden").lines() {
        let now = now.get(&name(then)).unwrap_or_else(|| panic!("{then}: is gone"));
        // A table may have grown at its end; the size of everything else is part of it.
        let same = if name(then).ends_with("Table") { fields(now).starts_with(&fields(then)) } else { *now == then };
        assert!(same, "{then}\nis now\n{now}");
    }
}

#[test]
fn the_header_has_the_name_that_abi_stable_looks_for() {
    // export_plugin! needs it as a literal.
    let name = abi_stable::library::ROOT_MODULE_LOADER_NAME;
    assert_eq!(name, "_1as_0lib_1header_0root_bmodule_bloader");
    assert!(include_str!("../export.rs").contains(&format!("export_name = \"{name}\"")));
}

#[test]
fn the_magic_block_is_plain_bytes() {
    let magic = Magic::new("merge-x");
    assert_eq!((&magic.word, magic.length, magic.abi_major, magic.abi_minor), (b"BLKLORA\0", 184, 1, 1));
    assert_eq!(super::magic::text(&magic.name), "merge-x");
    assert_eq!(super::magic::text(&magic.abi_stable), super::magic::ABI_STABLE_VERSION);
    assert!(super::magic::text(&magic.target).contains(std::env::consts::ARCH));
}
