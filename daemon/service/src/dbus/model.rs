//! org.blocklora.Daemon1.Model.

use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;
use zbus::OwnedObjectPath;

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::sets::check_plan;
use super::value::{Dict, Options};
use super::{entries_of, set_of};
use crate::error::{Error, Kind};
use crate::jobs::Lifetime;
use crate::jobs::queue::Control;
use crate::objects::{CompositionObject, ModelObject, Object, object_path, path_of};

/// Answers a call.
pub async fn answer(call: &Call, model: &Arc<ModelObject>, member: &str, method: &Method) -> Answer {
    match member {
        "Compose" => {
            let (list, options): (Vec<(OwnedObjectPath, Dict)>, Dict) = call.args()?;
            call.authorize("generate").await?;
            let mut options = Options::new(options);
            let strategy = options.string("strategy")?;
            let config = options.object("strategy_config")?;
            let lifetime = options.string("lifetime")?;
            let lifetime = lifetime.map_or(Ok(Lifetime::Connection), |name| Lifetime::from_name("lifetime", &name))?;
            options.finish()?;
            let list = list.into_iter().map(|(path, o)| (path.as_str().to_owned(), Options::new(o))).collect();
            let entries = entries_of(call, list).await?;
            let set = set_of(call, &model.id, entries, strategy, config).await?;
            let checked = set.clone();
            call.blocking(move |daemon| check_plan(daemon, &checked)).await?;
            let path = path_of("composition", &call.daemon.new_id());
            let object = CompositionObject {
                path: path.clone(),
                model: model.id.clone(),
                owner: call.caller.owner(),
                lifetime,
                content: Mutex::new((set, 1)),
            };
            call.daemon.add_owned(&path, Object::Composition(Arc::new(object)))?;
            call.reply(method, &object_path(&path))
        }
        "SetKeepAlive" => {
            let (usec, options): (u64, Dict) = call.args()?;
            no_options(options)?;
            call.authorize("manage-models").await?;
            model.state().keep_alive_usec = usec;
            call.daemon.touch(&model.object_path());
            call.reply(method, &())
        }
        "Unload" => {
            no_options(call.args::<Dict>()?)?;
            call.authorize("manage-models").await?;
            let (reply, done) = oneshot::channel();
            call.daemon.queue.control(Control::Unload { model: model.id.clone(), reply });
            done.await.map_err(|_| Error::new(Kind::ShuttingDown, "the daemon is stopping"))??;
            call.reply(method, &())
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("there is no method {member}"))),
    }
}
