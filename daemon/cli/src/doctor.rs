//! `blocklora doctor`: what is wrong, and what to do about each.

mod machine;

use std::path::{Path, PathBuf};

use blocklora_client::{Client, Error, ErrorKind, Place};
use blocklora_service::plugins::words::shown;
use serde::Serialize;

use crate::daemon::{self, Choice, Daemon, State};
use crate::{base, output};

/// Check daemon, bus, socket, rights, driver, device, model, plugins and state, and say what to do about each problem
///
/// Where a daemon may not use a GPU, the directive of its unit that denies it is named.
/// The exit code is 1 if something is broken; what is merely absent, such as a daemon that does not run, is no problem.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Folder of the base model in the diffusers layout [default: $BLOCKLORA_MODEL, or the bundled starter model]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    base: Option<PathBuf>,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// In order.
    Ok,
    /// Not there, and not needed.
    Absent,
    /// Works, but not as well as it could.
    Warning,
    /// Broken.
    Problem,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    says: String,
    /// What to do; empty where nothing is to be done.
    cure: String,
}

fn finding(check: &'static str, verdict: Verdict, says: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { check, verdict, says: says.into(), cure: cure.into() }
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    let mut findings = vec![program()];
    findings.push(state_folder());
    findings.push(starter(args));
    findings.extend(daemon::run(async { Ok(reachable(options).await) })?);
    if args.json {
        output::print_json(&findings)?;
    } else {
        let mut text = String::new();
        for f in &findings {
            let mark = match f.verdict {
                Verdict::Ok => "ok",
                Verdict::Absent => "-",
                Verdict::Warning => "warning",
                Verdict::Problem => "PROBLEM",
            };
            // Descriptions, names and reasons are other people's and programs'.
            text += &format!("{mark:<8} {:<14} {}\n", f.check, shown(&f.says));
            if !f.cure.is_empty() {
                text += &format!("{:<8} {:<14} -> {}\n", "", "", shown(&f.cure));
            }
        }
        output::print(&text)?;
    }
    match findings.iter().filter(|f| f.verdict == Verdict::Problem).count() {
        0 => Ok(()),
        1 => anyhow::bail!("1 problem: what to do stands above"),
        n => anyhow::bail!("{n} problems: what to do stands above"),
    }
}

fn program() -> Finding {
    match daemon::program() {
        Ok(program) => finding("program", Verdict::Ok, program.path.display().to_string(), ""),
        Err(error) => finding("program", Verdict::Problem, error.to_string(), "install blocklorad beside blocklora"),
    }
}

fn state_folder() -> Finding {
    let check = "state";
    let folder = match daemon::user_state() {
        Ok(folder) => folder,
        Err(error) => return finding(check, Verdict::Problem, error.to_string(), "set $HOME"),
    };
    let shown = folder.display().to_string();
    // The nearest folder that is there decides whether the rest can be made.
    let existing = folder.ancestors().find(|f| f.exists()).unwrap_or(Path::new("/")).to_path_buf();
    if !existing.is_dir() {
        return finding(check, Verdict::Problem, format!("{} is not a folder", existing.display()), "move it away");
    }
    match tempfile::tempfile_in(&existing) {
        Err(error) => {
            let cure =
                format!("make {} writable for you, or set $XDG_STATE_HOME to another folder", existing.display());
            finding(check, Verdict::Problem, format!("{shown}: {error}"), cure)
        }
        Ok(_) if folder.is_dir() => finding(check, Verdict::Ok, shown, ""),
        Ok(_) => finding(check, Verdict::Absent, format!("{shown} will be made when it is needed"), ""),
    }
}

fn starter(args: &Args) -> Finding {
    match base::folder(args.base.as_deref()) {
        Ok(folder) => finding("model folder", Verdict::Ok, folder.display().to_string(), ""),
        Err(error) => {
            let cure = "give a folder in the diffusers layout with --base or $BLOCKLORA_MODEL";
            finding("model folder", Verdict::Problem, format!("{error:#}"), cure)
        }
    }
}

/// Where daemons may be, and what the one that would be used says.
async fn reachable(options: &daemon::Options) -> Vec<Finding> {
    let mut findings = Vec::new();
    let places = match &options.choice {
        Choice::At(place) => vec![place.clone()],
        Choice::Auto => Place::usual(),
        Choice::Private => Vec::new(),
    };
    if places.iter().all(|place| *place != Place::SessionBus) && options.choice == Choice::Auto {
        let cure = "log in to a desktop, or set $DBUS_SESSION_BUS_ADDRESS";
        findings.push(finding("session bus", Verdict::Absent, "$DBUS_SESSION_BUS_ADDRESS is not set", cure));
    }
    for place in places {
        findings.push(one(&place, options.choice != Choice::Auto).await);
    }
    match daemon::connect(options, State::Temporary).await {
        Err(error) => {
            let cure = "run `blocklorad --private < /dev/null` to see what stops it";
            findings.push(finding("daemon", Verdict::Problem, error.to_string(), cure));
        }
        Ok(daemon) => {
            let is_system = matches!(daemon.client.place(), Some(Place::SystemBus))
                || daemon.client.place() == Some(&Place::system_socket());
            if is_system {
                findings.push(machine::polkit());
            }
            findings.extend(machine::gpu(is_system));
            match inside(&daemon).await {
                Ok(more) => findings.extend(more),
                Err(error) => findings.push(finding("daemon", Verdict::Problem, error.to_string(), "restart it")),
            }
            daemon.close().await;
        }
    }
    findings
}

async fn one(place: &Place, needed: bool) -> Finding {
    let check = match place {
        Place::SessionBus => "session bus",
        Place::SystemBus => "system bus",
        Place::Socket(_) => "socket",
        _ => "bus",
    };
    let absent = if needed { Verdict::Problem } else { Verdict::Absent };
    let (says, verdict, cure) = match Client::connect(place.clone()).await {
        Ok(client) => {
            let version = client.status().await.map(|s| s.version).unwrap_or_default();
            return finding(check, Verdict::Ok, format!("blocklorad {version} answers on {place}"), "");
        }
        Err(error @ Error::NotRunning { .. }) => {
            let unit = match place {
                Place::SystemBus => "sudo systemctl start blocklora",
                Place::Socket(path) if path.starts_with("/run/blocklora") => "sudo systemctl start blocklora",
                _ => "systemctl --user start blocklora",
            };
            (error.to_string(), absent, format!("to use one: {unit}"))
        }
        Err(error) if error.kind() == Some(ErrorKind::NotAuthorized) => {
            (error.to_string(), Verdict::Warning, machine::join_the_group())
        }
        Err(error) => (error.to_string(), Verdict::Problem, "restart the daemon".to_owned()),
    };
    finding(check, verdict, says, cure)
}

async fn inside(daemon: &Daemon) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let status = daemon.client.status().await?;
    let own = env!("CARGO_PKG_VERSION");
    let which = daemon.client.place().map_or("a private one starts and answers".into(), |p| format!("on {p}"));
    if status.version == own {
        findings.push(finding("daemon", Verdict::Ok, format!("{} {which}", status.version), ""));
    } else {
        let says = format!("{} {which}, but this is blocklora {own}", status.version);
        findings.push(finding("daemon", Verdict::Warning, says, "restart it, so that both are of one version"));
    }
    for device in &status.devices {
        let says = format!("{} ({}): {}", device.id, device.name, device.state);
        findings.push(match device.state.as_str() {
            "ready" => finding("device", Verdict::Ok, format!("{says}: {}", device.reason), ""),
            state => {
                let cure = match state {
                    "suspended" => "wake the machine up; the device comes back by itself",
                    "lost" => "see the kernel's log for the driver, then restart the daemon",
                    _ => "see the reason; with systemd, DeviceAllow= in the unit says which devices the daemon may use",
                };
                finding("device", Verdict::Problem, format!("{says}: {}", device.reason), cure)
            }
        });
    }
    let models = daemon.client.models().await?;
    if models.is_empty() && !daemon.is_private() {
        findings.push(finding("model", Verdict::Problem, "the daemon knows none", "add one: blocklora models add DIR"));
    }
    for model in models {
        let state = model.state().await?;
        let says = format!("{}: {} ({})", state.id, state.state, state.path);
        findings.push(match state.state.as_str() {
            "missing" | "failed" => {
                let cure = format!("repair the folder, or forget it: blocklora models remove {}", state.id);
                finding("model", Verdict::Problem, format!("{says}: {}", state.problem.1), cure)
            }
            _ => finding("model", Verdict::Ok, says, ""),
        });
    }
    let (mut usable, mut total) = (0, 0);
    for plugin in daemon.client.plugins().await? {
        let state = plugin.state().await?;
        total += 1;
        match state.state.as_str() {
            "enabled" => usable += 1,
            "disabled" => {}
            bad => {
                let cure = match bad {
                    "quarantined" => {
                        format!("replace it, or try again: blocklora plugin quarantine {} --lift", state.id)
                    }
                    _ => "build it again with the SDK of this version".to_owned(),
                };
                findings.push(finding("plugin", Verdict::Problem, format!("{}: {}", state.id, state.reason.1), cure));
            }
        }
    }
    findings.push(if usable == 0 {
        let cure = "install the plugins, or set $BLOCKLORA_PLUGIN_PATH to the folder that has them";
        finding("plugins", Verdict::Problem, "no method can be used", cure)
    } else {
        finding("plugins", Verdict::Ok, format!("{usable} of {total} methods can be used"), "")
    });
    Ok(findings)
}
