//! `blocklora merge`: a model folder with concepts built in.

use std::fs::File;
use std::io::{BufReader, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use blocklora_client::{Baked, CancelMode, JobOptions, Merge, Merged};
use blocklora_engine::bake::baked_concepts;

use crate::args::{ModelArgs, SetArgs, WeightedFile};
use crate::daemon::{self, choose_model, watch};
use crate::output::{self, OutputFolder, cannot_write};
use crate::set::{self, Members};

/// Write a model folder with concepts built in, for diffusers and every tool that reads its layout
///
/// In such a folder the words `<milo>` and `<milo>_1` stand for the concept; diffusers expands `<milo>` to both by
/// itself. Layer-wise words (the default of `train`) work fully here and, by their mean, nearly as well elsewhere;
/// train with `tokens = "plain"` where they must be exact in other tools.
#[derive(clap::Args)]
pub struct Args {
    /// Adapters, files or names of the library, and how strongly each is merged (1 is as trained)
    #[arg(required = true, value_name = "FILE[=WEIGHT]")]
    files: Vec<WeightedFile>,
    /// The folder to write; it must not be there yet, or be empty
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of the base model in the diffusers layout [default: $BLOCKLORA_MODEL, else that of a daemon that runs, else
    /// the bundled starter model]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    base: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    set: SetArgs,
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    let folder = OutputFolder::create(&args.output)?;
    set::check_files(&args.files)?;
    let started = Instant::now();
    let (merged, baked) = daemon::run(bake(args, options, &folder))?;
    folder.finish()?;
    if args.json {
        return output::print_json(&serde_json::json!({
            "folder": args.output,
            "merge": merged,
            "bake": baked,
            "seconds": started.elapsed().as_secs_f64(),
        }));
    }
    let names = args.files.len();
    output::print(&format!(
        "{}: {} merged in {:.0} ms ({} rows of {} layers), {} files written in {:.1} s\n",
        args.output.display(),
        if names == 1 { "1 concept".to_owned() } else { format!("{names} concepts") },
        merged.usec as f64 / 1e3,
        merged.rows_rewritten,
        merged.layers_touched,
        baked.files,
        baked.usec as f64 / 1e6
    ))?;
    Ok(())
}

async fn bake(args: &Args, options: &daemon::Options, folder: &OutputFolder) -> anyhow::Result<(Merged, Baked)> {
    let daemon = daemon::connect(options, set::state_for(&args.files, &[], "")).await?;
    let model = choose_model(&daemon, &ModelArgs { base: args.base.clone(), precision: None }).await?;
    let members = Members::new(&daemon, &model, &args.files).await?;
    members.check_model(&model)?;
    let (strategy, strategy_config) = set::strategy(&args.set)?;
    let request = Merge {
        strategy: strategy.unwrap_or_default(),
        strategy_config,
        adapters: members.entries(),
        model: Some(model.state.id.clone()),
        ..Merge::default()
    };
    let job = daemon.client.merge(&request).await?;
    let merged = watch::quietly(&job, "merging").await?;
    let path =
        blocklora_client::Path::try_from(merged.composition.clone()).context("the daemon gave no object path")?;
    let composition = daemon.client.composition(path).await?;

    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let writer = File::from(OwnedFd::from(writer));
    let job = daemon.client.bake(&composition, &writer, &JobOptions::default()).await?;
    // The daemon has its own end now; with ours closed, the archive ends when it is done.
    drop(writer);
    let (into, shown) = (folder.path().to_path_buf(), args.output.clone());
    let unpacking = tokio::task::spawn_blocking(move || unpack(reader, &into, &shown));
    let look = watch::Look { on_interrupt: CancelMode::Discard, ..watch::Look::bar("writing", 0) };
    let baked = watch::follow(&job, look).await;
    let unpacked = unpacking.await.context("unpacking the model failed")?;
    let baked = match baked {
        // Then the archive ends early.
        Err(error) if watch::is_cancelled(&error) || watch::is_disconnected(&error) => return Err(error),
        baked => {
            // Our own failure is the cause of the daemon's broken pipe.
            unpacked?;
            baked?
        }
    };
    daemon.close().await;
    Ok((merged, baked))
}

/// Unpacks a tar archive of plain files and folders into `folder`, which messages call `shown`.
fn unpack(reader: PipeReader, folder: &Path, shown: &Path) -> anyhow::Result<()> {
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 16, reader));
    archive.set_preserve_permissions(false);
    // The umask has made the folder what it is, and makes its files alike.
    archive.set_mask(!folder.metadata().map_err(|e| cannot_write(shown, e))?.mode() & 0o777);
    archive.set_preserve_mtime(false);
    let entries = archive.entries().context("the daemon's archive cannot be read")?;
    for entry in entries {
        let mut entry = entry.context("the daemon's archive cannot be read")?;
        let kind = entry.header().entry_type();
        anyhow::ensure!(kind.is_file() || kind.is_dir(), "the daemon's archive has something other than files in it");
        // False for a name that leads out of the folder.
        let inside = entry.unpack_in(folder).map_err(|e| cannot_write(shown, root_cause(e)))?;
        anyhow::ensure!(inside, "the daemon's archive has a file outside its folder");
    }
    // What follows the last file is padding; the daemon wants to get rid of it, too.
    let mut rest = archive.into_inner();
    std::io::copy(&mut rest.by_ref(), &mut std::io::sink()).context("the daemon's archive cannot be read")?;
    // A folder with the concepts in it, or nothing worth keeping.
    baked_concepts(folder)?;
    Ok(())
}

/// The system's own error under those that say which file of a temporary folder it was.
fn root_cause(error: std::io::Error) -> std::io::Error {
    let mut cause: &(dyn std::error::Error + 'static) = &error;
    let mut code = error.raw_os_error();
    while let Some(next) = cause.source() {
        cause = next;
        code = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error).or(code);
    }
    code.map_or(error, std::io::Error::from_raw_os_error)
}
