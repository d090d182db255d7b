//! Following a job on the terminal: a bar with speed, ETA and loss, pictures in progress, and Ctrl-C.

use std::time::Duration;

use blocklora_client::{CancelMode, Error, ErrorKind, Job, JobState};
use futures_util::StreamExt;
use indicatif::ProgressBar;
use serde::de::DeserializeOwned;

use crate::failure::Interrupted;
use crate::terminal::Screen;
use crate::{interrupt, progress};

/// How a job is shown.
pub struct Look<'a> {
    /// What stands before the bar.
    pub label: &'static str,
    /// Steps in all, where they are known before the job says so.
    pub steps: usize,
    /// Where pictures in progress appear.
    pub screen: Option<&'a mut Screen>,
    /// What Ctrl-C asks for.
    pub on_interrupt: CancelMode,
}

impl Look<'_> {
    /// A bar, without pictures; Ctrl-C keeps nothing.
    pub fn bar(label: &'static str, steps: usize) -> Self {
        Self { label, steps, screen: None, on_interrupt: CancelMode::Discard }
    }
}

/// Between two looks at Ctrl-C.
const TICK: Duration = Duration::from_millis(50);
/// Between two pictures in progress, microseconds.
const PREVIEW_USEC: u64 = 400_000;

/// Waits for a short job, with a spinner.
pub async fn quietly<R: DeserializeOwned>(job: &Job<R>, message: &'static str) -> anyhow::Result<R> {
    let spinner = progress::spinner(message);
    let result = end(job, CancelMode::Discard).await;
    spinner.finish_and_clear();
    result
}

/// Waits for a job and shows how far it is. Ctrl-C cancels it: the error is then [`ErrorKind::Cancelled`].
pub async fn follow<R: DeserializeOwned>(job: &Job<R>, look: Look<'_>) -> anyhow::Result<R> {
    let Look { label, steps, mut screen, on_interrupt } = look;
    let bar = progress::bar(label, steps);
    if bar.is_hidden() && screen.is_none() {
        return end(job, on_interrupt).await;
    }
    let mut states = job.progress().await?;
    let mut previews = match &screen {
        Some(screen) => Some(job.previews(PREVIEW_USEC, screen.side()).await?),
        None => None,
    };
    let mut shown = Shown::default();
    let ended = end(job, on_interrupt);
    tokio::pin!(ended);
    let result = loop {
        let frame = async {
            match &mut previews {
                Some(previews) => previews.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = &mut ended => break result,
            Some(state) = states.next() => shown.update(&bar, &state),
            frame = frame => match (frame, &mut screen) {
                (Some(Ok(frame)), Some(screen)) => bar.suspend(|| screen.show(&frame.png)),
                // The socket ends with the job, or nothing more can be read from it.
                _ => previews = None,
            },
        }
    };
    bar.finish_and_clear();
    result
}

/// Waits for one of many jobs, this one of `steps` steps, whose steps `bar` counts together. Ctrl-C cancels it.
pub async fn count_on<R: DeserializeOwned>(job: &Job<R>, bar: &ProgressBar, steps: u64) -> anyhow::Result<R> {
    let before = bar.position();
    let ended = end(job, CancelMode::Discard);
    tokio::pin!(ended);
    let result = if bar.is_hidden() {
        ended.await
    } else {
        let mut states = job.progress().await?;
        loop {
            tokio::select! {
                result = &mut ended => break result,
                Some(state) = states.next() => bar.set_position(before + u64::from(state.step.0)),
            }
        }
    };
    bar.set_position(before + steps);
    result
}

/// Shows how far somebody's job is until it ends. Ctrl-C ends the watching alone.
pub async fn look_on<R: DeserializeOwned>(job: &Job<R>, label: &'static str) -> anyhow::Result<R> {
    let bar = progress::bar(label, 0);
    let mut states = job.progress().await?;
    let mut shown = Shown::default();
    let ended = unless_interrupted(job.wait(), "the job goes on");
    tokio::pin!(ended);
    let result = loop {
        tokio::select! {
            result = &mut ended => break result.and_then(|ended| ended.map_err(Into::into)),
            Some(state) = states.next() => shown.update(&bar, &state),
        }
    };
    bar.finish_and_clear();
    result
}

/// Waits for `work`. Ctrl-C ends the waiting alone; the error then says `what` becomes of the work.
pub async fn unless_interrupted<T>(work: impl Future<Output = T>, what: &str) -> anyhow::Result<T> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return Ok(result),
            () = tokio::time::sleep(TICK) => if interrupt::requested() {
                return Err(Interrupted(what.to_owned()).into());
            },
        }
    }
}

/// Waits for the job's end; the first Ctrl-C cancels it.
async fn end<R: DeserializeOwned>(job: &Job<R>, on_interrupt: CancelMode) -> anyhow::Result<R> {
    let ended = job.wait();
    tokio::pin!(ended);
    let mut asked = false;
    loop {
        tokio::select! {
            result = &mut ended => return Ok(result?),
            () = tokio::time::sleep(TICK) => if interrupt::requested() && !asked {
                asked = true;
                job.cancel(on_interrupt).await?;
            },
        }
    }
}

/// Whether a job ended because somebody cancelled it.
pub fn is_cancelled(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().and_then(Error::kind) == Some(ErrorKind::Cancelled)
}

/// Whether the daemon is not there any more.
pub fn is_disconnected(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(Error::is_disconnected)
}

/// What the bar shows.
#[derive(Default)]
struct Shown {
    started: bool,
    loss: Option<f64>,
    step: u32,
}

impl Shown {
    fn update(&mut self, bar: &ProgressBar, state: &JobState) {
        let (step, steps) = state.step;
        if steps > 0 {
            bar.set_length(u64::from(steps));
            if step > 0 && !self.started {
                // A resumed training begins in the middle: speed and ETA count from there.
                bar.set_position(u64::from(step.saturating_sub(1)));
                bar.reset_eta();
                self.started = true;
            }
            bar.set_position(u64::from(step));
        }
        bar.set_message(self.message(state));
    }

    fn message(&mut self, state: &JobState) -> String {
        if state.queue_position > 0 {
            return format!("waiting, number {} in the queue", state.queue_position);
        }
        match state.loss() {
            Some(loss) if state.step.0 != self.step => {
                // One step's loss says little: its timestep decides most of it.
                let mean = self.loss.map_or(loss, |mean| 0.9 * mean + 0.1 * loss);
                self.loss = Some(mean);
                self.step = state.step.0;
            }
            _ => {}
        }
        match (state.stage.as_str(), self.loss) {
            ("training", Some(loss)) => format!("loss {loss:.4}"),
            ("sampling" | "training", _) => String::new(),
            ("prior", _) => "drawing pictures of the class".to_owned(),
            (stage, _) => stage.replace('-', " "),
        }
    }
}
