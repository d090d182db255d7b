//! org.blocklora.Daemon1.Plugin.

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::value::{Dict, Options};
use crate::error::Error;
use crate::jobs::work::Work;
use crate::jobs::{Lifetime, Priority};
use crate::objects::{ROOT, object_path, path_of};

/// Answers a call on the plugin `id`.
pub async fn answer(call: &Call, id: &str, member: &str, method: &Method) -> Answer {
    match member {
        "SetState" => {
            let (state, options): (String, Dict) = call.args()?;
            no_options(options)?;
            if !["enabled", "disabled", "cleared"].contains(&state.as_str()) {
                return Err(Error::option(format!("state {state:?} is not enabled, disabled or cleared")).into());
            }
            call.authorize("load-plugin").await?;
            let owned = id.to_owned();
            call.blocking(move |daemon| daemon.methods.set_state(&owned, &state)).await?;
            call.daemon.touch(&path_of("plugin", id));
            call.daemon.touch(ROOT);
            call.reply(method, &())
        }
        "Validate" => {
            let (level, options): (u32, Dict) = call.args()?;
            let mut options = Options::new(options);
            let ticket = call.ticket(&mut options, Priority::Normal, Lifetime::Connection)?;
            options.finish()?;
            if level > 3 {
                return Err(Error::option(format!("level = {level}: must be 0 to 3")).into());
            }
            call.authorize("load-plugin").await?;
            let job = call.daemon.submit(&ticket, Work::ValidatePlugin { id: id.to_owned(), level })?;
            call.reply(method, &object_path(&job.path))
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("there is no method {member}"))),
    }
}
