//! Plugins as objects: they come, change and go while the daemon runs.

use super::Daemon;
use crate::objects::{Object, ROOT, path_of};

impl Daemon {
    /// Looks for plugins again, and shows what there is now. A plugin that is new is tried, which may take long.
    pub fn look_for_plugins(&self) {
        let before = self.methods.list();
        self.methods.refresh();
        let now = self.methods.list();
        for method in &now {
            let path = path_of("plugin", &method.id);
            if self.object(&path).is_none() {
                self.add_object(&path, Object::Plugin(method.id.clone()));
            } else if !before.contains(method) {
                self.touch(&path);
            }
        }
        for method in before.iter().filter(|method| now.iter().all(|other| other.id != method.id)) {
            self.remove_object(&path_of("plugin", &method.id));
        }
        if before != now {
            self.touch(ROOT);
        }
    }
}
