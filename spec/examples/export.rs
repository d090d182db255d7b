//! Exports an adapter for other tools: `cargo run -p blocklora-spec --example export -- FILE FOLDER` writes
//! `FOLDER/kohya.safetensors`, `FOLDER/diffusers.safetensors`, `FOLDER/peft/` and, where the tokens are plain,
//! `FOLDER/tokens.safetensors`.

use std::path::PathBuf;
use std::process::ExitCode;

use blocklora_spec::{Adapter, Result, export};

fn run(file: PathBuf, folder: PathBuf) -> Result<()> {
    let adapter = Adapter::open(file)?;
    export::kohya(&adapter, folder.join("kohya.safetensors"))?;
    export::diffusers(&adapter, folder.join("diffusers.safetensors"))?;
    export::peft(&adapter, folder.join("peft"))?;
    if adapter.tokens().iter().all(|t| t.layers == 1) {
        export::textual_inversion(&adapter, folder.join("tokens.safetensors"))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(file), Some(folder), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("usage: export FILE FOLDER");
        return ExitCode::from(2);
    };
    match run(file, folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
