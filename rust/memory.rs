//! Memory that many threads share: how much of it decoders may hold at once, and how outputs are paged.

use crate::errors::ImageFault;
use crate::header::{Format, Header};
use crate::normalize::Sample;
use crate::rgb::BYTES;
use std::any::Any;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::sync::{Condvar, Mutex, PoisonError};

/// What decoders of all threads together may hold. One image that needs more gets it, alone.
const MAX_DECODING_BYTES: usize = 2 << 30;
/// What one batch may leave behind for the next.
const MAX_SPARE_BYTES: usize = 512 << 20;
/// Outputs from this size on are worth large pages, as `NumPy` finds too.
const HUGE_PAGES_FROM_BYTES: usize = 4 << 20;

/// Bytes that are given out and come back.
pub struct Budget {
    limit: usize,
    held: Mutex<usize>,
    freed: Condvar,
}

/// Bytes in use; they come back when this goes.
pub struct Held<'b> {
    budget: &'b Budget,
    bytes: usize,
}

impl Budget {
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, held: Mutex::new(0), freed: Condvar::new() }
    }

    /// Waits until `bytes` are free. Who holds some must not wait for more.
    pub fn acquire(&self, bytes: usize) -> Held<'_> {
        let bytes = bytes.min(self.limit);
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = |held: &mut usize| *held + bytes > self.limit;
        let mut held = self.freed.wait_while(held, wait).unwrap_or_else(PoisonError::into_inner);
        *held += bytes;
        Held { budget: self, bytes }
    }
}

/// As much as decoders may hold.
impl Default for Budget {
    fn default() -> Self {
        Self::new(MAX_DECODING_BYTES)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *self.budget.held.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.freed.notify_all();
    }
}

/// What decoding a file takes beside its output.
#[must_use]
pub fn decoding_bytes(header: &Header) -> usize {
    let pixels = header.width as usize * header.height as usize;
    let turned = if header.orientation.is_upright() { 0 } else { BYTES * pixels };
    // A JPEG's coefficients are two bytes each; the others are at most RGBA.
    let decoder = match header.format {
        _ if !header.passes => 0,
        Format::Jpeg => 2 * BYTES * pixels,
        Format::Png | Format::Webp | Format::Gif => 4 * pixels,
    };
    decoder + turned
}

/// The memory of a large batch that was let go of, for the next one: the system would have to clear new pages for it,
/// which costs up to a third of the work.
#[derive(Default)]
pub struct Spare(Mutex<Option<Box<dyn Any + Send>>>);

impl Spare {
    /// Keeps the samples' memory, in place of what was kept before, when it is worth it and not too much.
    pub fn give<T: Sample>(&self, samples: Vec<T>) {
        let bytes = samples.capacity().saturating_mul(size_of::<T>());
        if !(HUGE_PAGES_FROM_BYTES..=MAX_SPARE_BYTES).contains(&bytes) {
            return;
        }
        // Not waited for: in a forked child its holder may not live on.
        if let Ok(mut spare) = self.0.try_lock() {
            *spare = Some(Box::new(samples));
        }
    }

    /// Kept memory for `len` samples, unless it is more than twice as large.
    fn take<T: Sample>(&self, len: usize) -> Option<Vec<T>> {
        let mut spare = self.0.try_lock().ok()?;
        let fits = |samples: &Vec<T>| samples.capacity() >= len && samples.capacity() / 2 <= len;
        spare.as_ref()?.downcast_ref::<Vec<T>>().filter(|samples| fits(samples))?;
        spare.take()?.downcast::<Vec<T>>().ok().map(|samples| *samples)
    }

    /// Lets go of it.
    pub fn clear(&self) {
        if let Ok(mut spare) = self.0.try_lock() {
            *spare = None;
        }
    }
}

/// Room for samples that are all to be written: zeroing it first would cost as much as a tenth of the work.
pub fn allocate_unwritten<T: Sample>(len: usize, spare: &Spare) -> Result<Vec<MaybeUninit<T>>, ImageFault> {
    if let Some(samples) = spare.take::<T>(len) {
        let mut samples = forget_written(samples);
        samples.clear();
        return Ok(stretch(samples, len));
    }
    let mut samples = Vec::new();
    let wanted = len.saturating_mul(size_of::<T>());
    samples.try_reserve_exact(len).map_err(|_| ImageFault::OutOfMemory(wanted))?;
    let samples = stretch(samples, len);
    advise_huge_pages(&samples);
    Ok(samples)
}

/// To its whole length, within its capacity.
fn stretch<T>(mut samples: Vec<MaybeUninit<T>>, len: usize) -> Vec<MaybeUninit<T>> {
    assert!(samples.capacity() >= len);
    #[expect(unsafe_code, reason = "the standard library's own way to it is not stable")]
    // SAFETY: there is room for `len`, and a `MaybeUninit` is valid whatever is in it.
    unsafe {
        samples.set_len(len);
    }
    if cfg!(debug_assertions) {
        poison(&mut samples);
    }
    samples
}

/// Samples as room for others.
fn forget_written<T: Sample>(samples: Vec<T>) -> Vec<MaybeUninit<T>> {
    let mut samples = ManuallyDrop::new(samples);
    #[expect(unsafe_code, reason = "the way back from `assume_written`")]
    // SAFETY: the parts of a vector that is not dropped; what is written may be taken for unwritten.
    unsafe {
        Vec::from_raw_parts(samples.as_mut_ptr().cast(), samples.len(), samples.capacity())
    }
}

/// What was not written shows in tests: all ones are a NaN of every kind of float.
fn poison<T>(samples: &mut [MaybeUninit<T>]) {
    #[expect(unsafe_code, reason = "bytes are written whatever the type")]
    // SAFETY: as many bytes as the slice has, into memory that may hold anything.
    unsafe {
        samples.as_mut_ptr().cast::<u8>().write_bytes(0xff, size_of_val(samples));
    }
}

/// The samples, now that they are written.
///
/// # Safety
/// Every one of them must have been written.
#[expect(unsafe_code, reason = "only the writer knows")]
#[must_use]
pub unsafe fn assume_written<T: Sample>(samples: Vec<MaybeUninit<T>>) -> Vec<T> {
    let mut samples = ManuallyDrop::new(samples);
    // SAFETY: the parts of a vector that is not dropped; its elements are written, and laid out as `T` is.
    unsafe { Vec::from_raw_parts(samples.as_mut_ptr().cast(), samples.len(), samples.capacity()) }
}

/// Asks the system for large pages behind a large new buffer: it is written once, and most of that would be the
/// system handing out small ones.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables, reason = "other systems decide for themselves"))]
fn advise_huge_pages<T>(buffer: &[T]) {
    #[cfg(target_os = "linux")]
    if size_of_val(buffer) >= HUGE_PAGES_FROM_BYTES {
        const PAGE: usize = 4096;
        let start = (buffer.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (buffer.as_ptr() as usize + size_of_val(buffer)) / PAGE * PAGE;
        #[expect(unsafe_code, reason = "a call of the system")]
        // SAFETY: the pages lie within the buffer, and the advice changes nothing of what is in them.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn holders_never_have_more_than_the_limit() {
        let budget = Budget::new(100);
        let (held, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let (budget, held, most) = (&budget, &held, &most);
                scope.spawn(move || {
                    for turn in 0..50 {
                        let bytes = 10 + (thread * 31 + turn * 17) % 60;
                        let _lease = budget.acquire(bytes);
                        most.fetch_max(held.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                        held.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        let most = most.into_inner();
        assert!(most <= 100 && most > 60, "{most}");
    }

    #[test]
    fn memory_let_go_of_is_used_again_where_it_fits() {
        let spare = Spare::default();
        let len = HUGE_PAGES_FROM_BYTES;
        spare.give(vec![7_u8; len / 2]); // too small to be kept
        assert!(spare.take::<u8>(len / 2).is_none());
        let samples = vec![7_u8; len];
        let place = samples.as_ptr();
        spare.give(samples);
        assert!(spare.take::<u16>(len / 2).is_none()); // of another kind
        assert!(spare.take::<u8>(len + 1).is_none());
        assert!(spare.take::<u8>(len / 2 - 1).is_none());
        let again = allocate_unwritten::<u8>(len - 5, &spare).unwrap();
        assert_eq!((again.as_ptr().cast(), again.len()), (place, len - 5));
        assert!(spare.take::<u8>(len).is_none());
    }

    #[test]
    fn one_that_wants_more_than_all_gets_all() {
        let budget = Budget::new(100);
        drop(budget.acquire(1000));
        drop(budget.acquire(100));
    }
}
