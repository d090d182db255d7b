//! A plugin with its settings, behind a pointer.

use abi_stable::StableAbi;

/// A plugin's instance: made by `create`, used by the functions of its kind, from any thread and from several at once,
/// and given back to `destroy` exactly once, when no call is under way.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawInstance {
    data: *mut (),
}

// SAFETY: instances hold `Send + Sync` values only (`Config` plugins are required to be both).
unsafe impl Send for RawInstance {}
// SAFETY: as above.
unsafe impl Sync for RawInstance {}

impl RawInstance {
    /// Moves `value` behind the pointer.
    pub fn new<T: Send + Sync + 'static>(value: T) -> Self {
        Self { data: Box::into_raw(Box::new(value)).cast() }
    }

    /// # Safety
    /// It was made by [`RawInstance::new`] with a `T`, and is not destroyed while `'a` lasts.
    pub unsafe fn get<'a, T: Send + Sync + 'static>(self) -> &'a T {
        // SAFETY: by the contract above.
        unsafe { &*self.data.cast::<T>() }
    }

    /// # Safety
    /// It was made by [`RawInstance::new`] with a `T`, and is never used again.
    pub unsafe fn destroy<T: Send + Sync + 'static>(self) {
        // SAFETY: by the contract above.
        drop(unsafe { Box::from_raw(self.data.cast::<T>()) });
    }
}
