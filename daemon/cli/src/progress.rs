//! Progress bars on stderr; nothing is drawn where stderr is not a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

fn styled(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    // A template is one of the constants below; a wrong one falls back to indicatif's own.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸ "));
    }
    bar
}

/// A bar for `length` pieces of work of one kind; its message stands at the end.
pub fn bar(label: &'static str, length: usize) -> ProgressBar {
    let bar = styled(length as u64, "{prefix:<10} {bar:30} {pos}/{len}  {per_sec}  ETA {eta}  {msg}");
    bar.set_prefix(label);
    bar
}

/// A spinner for work of unknown length.
pub fn spinner(message: &'static str) -> ProgressBar {
    let bar = styled(0, "{spinner} {msg} {elapsed}");
    bar.set_message(message);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
