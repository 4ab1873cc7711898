//! One image to its views: found in the cache, or decoded once and written, strip by strip, where they belong.

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::cache::{Cache, Key};
use crate::decode::{Wanted, can_scale, decode, decode_rows, scaled_size};
use crate::errors::ImageFault;
use crate::geometry::Region;
use crate::memory::{Budget, Spare, decoding_bytes};
use crate::normalize::{Normalizer, Sample};
use crate::plan::{Config, ViewPlan};
use crate::rgb::Rows;
use crate::source::{Probe, Source, array_rows, read_file};
use crate::steps::{Step, Work};

/// Rows of a picture that are handed on at a time: they stay in the cache for all views that use them.
const STRIP: usize = 16;

/// What all batches of a process share.
#[derive(Default)]
pub struct Shared {
    pub decoding: Budget,
    pub cache: Cache,
    pub spare: Spare,
}

/// How far a batch is, and whether it is to go on.
#[derive(Debug, Default)]
pub struct Control {
    pub cancelled: AtomicBool,
    /// Distinct images done.
    pub done: AtomicUsize,
    /// Distinct images to do: those of rows that can be planned, known once all are.
    pub total: AtomicUsize,
}

/// A view, the row it is for, and its part of the buffer.
pub struct Task<'b, T> {
    pub row: usize,
    pub view: &'b ViewPlan,
    pub out: &'b mut [MaybeUninit<T>],
}

/// What all images of a batch are made with.
pub struct Worker<'w, T> {
    pub config: &'w Config,
    pub shared: &'w Shared,
    pub control: &'w Control,
    pub normalizer: Normalizer<T>,
}

impl<T: Sample> Worker<'_, T> {
    /// Decodes one image and writes all its views.
    pub fn fill_tasks(
        &self,
        source: &Source<'_>,
        probe: Result<&Probe, &ImageFault>,
        tasks: Vec<Task<'_, T>>,
        spread: bool,
    ) -> Result<(), ImageFault> {
        let probe = probe.map_err(Clone::clone)?;
        self.check_cancelled()?;
        let bytes = match source {
            Source::Bytes(bytes) => Cow::Borrowed(*bytes),
            Source::Path(path) => Cow::Owned(read_file(path, self.config.limits)?),
            &Source::Pixels { pixels, width, height } => {
                return self.fill_from(array_rows(pixels, width, height), tasks, spread);
            }
        };
        // Of all views, whether or not some are in the cache: the same batch gives the same pixels.
        let denominator = self.pick_denominator(probe, &tasks);
        if self.config.cache_bytes == 0 {
            return self.decode_tasks(&bytes, probe, tasks, denominator, spread);
        }
        let content = blake3::hash(&bytes);
        let mut missing = Vec::new();
        let mut keys = Vec::new();
        for task in tasks {
            let key = self.name_view(content, task.view, denominator);
            match self.shared.cache.get(&key) {
                Some(view) if view.len() == size_of_val(task.out) => {
                    // Byte by byte: what the cache holds need not lie at an address fit for samples.
                    for (target, bytes) in task.out.iter_mut().zip(view.chunks_exact(size_of::<T>())) {
                        target.write(bytemuck::pod_read_unaligned(bytes));
                    }
                }
                _ => {
                    keys.push(key);
                    missing.push(task);
                }
            }
        }
        self.decode_and_keep(&bytes, probe, missing, &keys, denominator, spread)
    }

    fn decode_and_keep(
        &self,
        bytes: &[u8],
        probe: &Probe,
        mut tasks: Vec<Task<'_, T>>,
        keys: &[Key],
        denominator: u32,
        spread: bool,
    ) -> Result<(), ImageFault> {
        if tasks.is_empty() {
            return Ok(());
        }
        let lent =
            tasks.iter_mut().map(|task| Task { row: task.row, view: task.view, out: &mut *task.out }).collect();
        self.decode_tasks(bytes, probe, lent, denominator, spread)?;
        for (task, key) in tasks.iter().zip(keys) {
            #[expect(unsafe_code, reason = "samples are written once")]
            // SAFETY: `decode_tasks` has written all samples of every task, or failed.
            let samples = unsafe { &*(std::ptr::from_ref(&*task.out) as *const [T]) };
            self.shared.cache.put(*key, bytemuck::cast_slice(samples), self.config.cache_bytes);
        }
        Ok(())
    }

    /// What a view is made of: the content, and all that decides its samples.
    fn name_view(&self, content: blake3::Hash, view: &ViewPlan, denominator: u32) -> Key {
        let Config { filter, parity, scaling, policy, .. } = self.config;
        let how = (view.region, &view.steps, self.config.layout(), filter, parity, scaling, policy, denominator);
        let mut hasher = blake3::Hasher::new();
        hasher.update(content.as_bytes());
        hasher.update(format!("{} {how:?}", std::any::type_name::<T>()).as_bytes());
        *hasher.finalize().as_bytes()
    }

    fn decode_tasks(
        &self,
        bytes: &[u8],
        probe: &Probe,
        mut tasks: Vec<Task<'_, T>>,
        denominator: u32,
        spread: bool,
    ) -> Result<(), ImageFault> {
        let Some(header) = &probe.header else { return Err(ImageFault::Undecodable("it has no header".into())) };
        let (policy, parity, layout) = (self.config.policy, self.config.parity, self.config.layout());
        let held = self.shared.decoding.acquire(decoding_bytes(header));
        let (width, height) = scaled_size(header, denominator);
        let scale = |region: Region| scale_region(region, denominator, (width, height));
        let regions: Vec<Region> = tasks.iter().map(|task| scale(task.view.region)).collect();
        let Some(wanted) = regions.iter().copied().reduce(|a, b| a.around(&b)) else { return Ok(()) };
        if spread && tasks.len() > 1 && denominator == 1 && wanted == Region::whole(width, height) {
            let image = decode(bytes, header, policy)?;
            // Before other threads are waited for: this one may meanwhile take up work that waits for memory.
            drop(held);
            return self.fill_from(image.rows(), tasks, true);
        }
        let mut works = Vec::with_capacity(tasks.len());
        for (task, region) in tasks.iter_mut().zip(regions) {
            let work =
                Work::new(&task.view.steps, (region.width, region.height), layout, parity, &self.normalizer)?;
            let inside = Region { left: region.left - wanted.left, top: region.top - wanted.top, ..region };
            works.push((work, inside, &mut *task.out, task.view.frames));
        }
        let mut top = 0;
        decode_rows(bytes, header, policy, Wanted { region: wanted, denominator }, &mut |rows| {
            self.check_cancelled()?;
            for (work, region, out, _) in &mut works {
                if let Some(rows) = rows.window(top, *region) {
                    work.push(rows, out)?;
                }
            }
            top += rows.count() as u32;
            Ok(())
        })?;
        works.into_iter().try_for_each(|(work, _, _, frames)| work.finish(frames))
    }

    /// Writes the views of a picture that lies in memory.
    fn fill_from(&self, rows: Rows<'_>, tasks: Vec<Task<'_, T>>, spread: bool) -> Result<(), ImageFault> {
        let fill = |task: Task<'_, T>| {
            let region = task.view.region;
            let size = (region.width, region.height);
            let (layout, parity) = (self.config.layout(), self.config.parity);
            let mut work = Work::new(&task.view.steps, size, layout, parity, &self.normalizer)?;
            let rows = rows.window(0, region).ok_or_else(|| ImageFault::Truncated("0 rows".into()))?;
            for strip in rows.strips(STRIP) {
                self.check_cancelled()?;
                work.push(strip, task.out)?;
            }
            work.finish(task.view.frames)
        };
        if spread { tasks.into_par_iter().try_for_each(fill) } else { tasks.into_iter().try_for_each(fill) }
    }

    /// How much smaller a JPEG is decoded: no view may then have to be blown up that was shrunk before.
    fn pick_denominator(&self, probe: &Probe, tasks: &[Task<'_, T>]) -> u32 {
        if !self.config.scaled_decode || !probe.header.as_ref().is_some_and(can_scale) {
            return 1;
        }
        let shrink = |task: &Task<'_, T>| {
            let of_step = |step: &Step| match step {
                Step::Resize { to, .. } => (task.view.region.width / to.0).min(task.view.region.height / to.1),
                _ => 1,
            };
            task.view.steps.iter().map(of_step).min().unwrap_or(1)
        };
        let shrink = tasks.iter().map(shrink).min().unwrap_or(1);
        [8, 4, 2].into_iter().find(|&denominator| shrink >= denominator).unwrap_or(1)
    }

    fn check_cancelled(&self) -> Result<(), ImageFault> {
        if self.control.cancelled.load(Ordering::Relaxed) { Err(ImageFault::Cancelled) } else { Ok(()) }
    }
}

/// A region on the picture decoded at a part of its size: the pixels that have a part in it.
fn scale_region(region: Region, denominator: u32, (width, height): (u32, u32)) -> Region {
    let left = (region.left / denominator).min(width - 1);
    let top = (region.top / denominator).min(height - 1);
    let right = (region.left + region.width).div_ceil(denominator).min(width);
    let bottom = (region.top + region.height).div_ceil(denominator).min(height);
    Region { left, top, width: right - left, height: bottom - top }
}
