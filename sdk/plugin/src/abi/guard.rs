//! Nothing unwinds across the boundary: a panic becomes an error.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use abi_stable::std_types::RResult;

use super::types::RawError;
use crate::error::{Code, Error, Result};

thread_local! {
    /// Where this thread last panicked.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes panics remember their place instead of writing to the host's stderr. Of the library that calls it: each has its
/// own hook, as each has its own copy of std.
pub fn remember_places() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line()));
        PLACE.with(|last| *last.borrow_mut() = place);
    }));
}

/// Runs `f`; its error or its panic crosses the boundary as data.
pub fn guard<T>(f: impl FnOnce() -> Result<T>) -> RResult<T, RawError> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => RResult::ROk(value),
        Ok(Err(error)) => RResult::RErr(error.into()),
        Err(payload) => RResult::RErr(panicked(payload).into()),
    }
}

/// Runs `f`, which answers nothing: a panic is dropped.
pub fn guard_quietly<T>(otherwise: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        std::mem::forget(payload);
        otherwise
    })
}

fn panicked(payload: Box<dyn Any + Send>) -> Error {
    let text = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_owned(),
    };
    // Dropping a foreign payload may panic again.
    std::mem::forget(payload);
    let place = PLACE.with(|last| last.borrow_mut().take()).map(|place| format!(" at {place}")).unwrap_or_default();
    Error::new(Code::Panicked, format!("panicked{place}: {text}"))
}
