//! Rows to pixels: plan from headers, decode each image once, write every view into one buffer, keep the order.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::errors::{ImageFault, ViewError, catch_panic};
use crate::fill::{Control, Shared, Task, Worker};
use crate::memory::{allocate_unwritten, assume_written};
use crate::normalize::{Normalizer, Sample};
use crate::plan::{Config, Row, RowPlan, name_image, plan_row};
use crate::source::{Probe, Source, SourceKey};

/// Bytes of a line of the cache: where samples begin, so that lines can be written whole.
const LINE: usize = 64;

/// The views of a batch.
#[derive(Debug)]
pub struct Batch<T> {
    /// `[patches or frames, features]`, row after row, from `lead` on.
    pub samples: Vec<T>,
    /// What lies before the first line of the cache.
    pub lead: usize,
    /// Per row, its plan and the place of its first patch or frame.
    pub rows: Vec<Result<(RowPlan, usize), ViewError>>,
}

/// Rows whose headers are read and boxes checked, with nothing decoded.
pub struct Planned<'r, 'a> {
    rows: &'r [Row<'a>],
    /// The distinct images with what is known of them.
    images: Vec<(&'r Source<'a>, Result<Probe, ImageFault>)>,
    /// Per row, or why it will have no views.
    pub plans: Vec<Result<RowPlan, ViewError>>,
}

impl Planned<'_, '_> {
    /// Pixels to decode and to write: about the time that making the views takes.
    #[must_use]
    pub fn pixels(&self, config: &Config) -> u64 {
        let decoded = |(_, probe): &(_, Result<Probe, ImageFault>)| {
            probe.as_ref().map_or(0, |probe| u64::from(probe.size.0) * u64::from(probe.size.1))
        };
        let frames = |plan: &RowPlan| plan.count_frames(0..plan.views.len()) as u64;
        let written = self.plans.iter().flatten().map(frames).sum::<u64>() * config.layout().pixels() as u64;
        self.images.iter().map(decoded).sum::<u64>() + written
    }
}

/// Makes the views of every row; one result per row, in order.
#[must_use]
pub fn make_views<T: Sample>(
    planned: Planned<'_, '_>,
    config: &Config,
    pool: &ThreadPool,
    shared: &Shared,
    control: &Control,
) -> Batch<T> {
    let Planned { rows, images, plans } = planned;
    let features = config.layout().features();
    let frames: usize = plans.iter().flatten().map(|plan| plan.count_frames(0..plan.views.len())).sum();
    let wanted = frames.saturating_mul(features).saturating_add(LINE / size_of::<T>());
    let mut samples: Vec<MaybeUninit<T>> = match allocate_unwritten(wanted, &shared.spare) {
        Ok(samples) => samples,
        Err(fault) => {
            let refuse = |(row, plan): (&Row<'_>, Result<_, _>)| {
                plan.and_then(|_: RowPlan| Err(name_image(row, 0, fault.clone())))
            };
            return Batch { samples: Vec::new(), lead: 0, rows: rows.iter().zip(plans).map(refuse).collect() };
        }
    };
    let mut tasks: Vec<Vec<Task<'_, T>>> = images.iter().map(|_| Vec::new()).collect();
    let mut starts = Vec::with_capacity(rows.len());
    let mut ranges = Vec::with_capacity(rows.len());
    let lead = samples.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
    samples.truncate(lead + frames * features);
    samples[..lead].fill(MaybeUninit::new(T::default()));
    let (mut rest, mut start) = (&mut samples[lead..], 0);
    for (row, plan) in plans.iter().enumerate() {
        starts.push(start);
        let frames = plan.as_ref().map_or(0, |plan| plan.count_frames(0..plan.views.len()));
        ranges.push(lead + start * features..lead + (start + frames) * features);
        for view in plan.iter().flat_map(|plan| &plan.views) {
            let (out, after) = rest.split_at_mut(view.frames * features);
            rest = after;
            start += view.frames;
            if view.same_as.is_none() {
                tasks[view.image].push(Task { row, view, out });
            }
        }
    }
    // Those of rows that will have no views are left alone.
    let images_to_do = tasks.iter().filter(|tasks| !tasks.is_empty()).count();
    control.total.store(images_to_do, Ordering::Relaxed);
    let normalizer = Normalizer::new(config.scaling, config.parity).for_output(frames * features * size_of::<T>());
    let work = Worker { config, shared, control, normalizer };
    // One image on many threads: its views are spread. Otherwise images are, and each of them streams.
    let spread = images.len() == 1 && pool.current_num_threads() > 1;
    let fill = |(image, tasks): (usize, Vec<Task<'_, T>>)| {
        let (source, probe) = &images[image];
        let owners: Vec<usize> = tasks.iter().map(|task| task.row).collect();
        let done = catch_panic(|| work.fill_tasks(source, probe.as_ref(), tasks, spread));
        control.done.fetch_add(1, Ordering::Relaxed);
        let fault = done.err();
        owners.into_iter().filter_map(move |row| Some((row, image, fault.clone()?)))
    };
    let tasks: Vec<_> = tasks.into_iter().enumerate().filter(|(_, tasks)| !tasks.is_empty()).collect();
    let faults: Vec<(usize, usize, ImageFault)> = if pool.current_num_threads() == 1 {
        tasks.into_iter().flat_map(fill).collect() // here: waking another thread would only take time
    } else {
        pool.install(|| tasks.into_par_iter().with_max_len(1).flat_map_iter(fill).collect())
    };
    let mut made: Vec<_> = plans.into_iter().zip(starts).map(|(plan, start)| Ok((plan?, start))).collect();
    for (row, image, fault) in faults {
        if made[row].is_ok() {
            let key = images[image].0.key();
            let index = rows[row].images.iter().position(|source| source.key() == key).unwrap_or(0);
            made[row] = Err(name_image(&rows[row], index, fault));
        }
    }
    for (row, range) in made.iter().zip(ranges) {
        match row {
            Ok((plan, start)) => copy_repeated(plan, *start, features, &mut samples[lead..]),
            Err(_) => samples[range].fill(MaybeUninit::new(T::default())),
        }
    }
    #[expect(unsafe_code, reason = "samples are written once")]
    // SAFETY: the rows' ranges make up all samples. Those of a row with a fault were just filled. In the others every
    // view was written by `fill_tasks`, which fails when `Work` has written another number of patches or frames than the
    // view has, or copied from one that was.
    let samples = unsafe { assume_written(samples) };
    Batch { samples, lead, rows: made }
}

/// Reads headers and checks boxes, without decoding.
#[must_use]
pub fn plan_rows<'r, 'a>(rows: &'r [Row<'a>], config: &Config, pool: &ThreadPool) -> Planned<'r, 'a> {
    let mut indices: HashMap<SourceKey<'r>, usize> = HashMap::new();
    let mut sources: Vec<&Source<'a>> = Vec::new();
    let mut uses: Vec<Vec<usize>> = Vec::with_capacity(rows.len());
    for row in rows {
        let found = row.images.iter().map(|source| {
            *indices.entry(source.key()).or_insert_with(|| {
                sources.push(source);
                sources.len() - 1
            })
        });
        uses.push(found.collect());
    }
    let probe = |source: &&Source<'_>| source.probe(config.limits, config.policy);
    // One header is read sooner than a thread wakes.
    let probes: Vec<_> = match sources.len() {
        0 | 1 => sources.iter().map(probe).collect(),
        _ => pool.install(|| sources.par_iter().map(probe).collect()),
    };
    let plans = rows.iter().zip(&uses).map(|(row, images)| plan_row(row, images, &probes, config)).collect();
    Planned { rows, images: sources.into_iter().zip(probes).collect(), plans }
}

/// Views that are the same as an earlier one of their row are copied from it.
fn copy_repeated<T: Copy>(plan: &RowPlan, start: usize, features: usize, samples: &mut [T]) {
    let place = |view: usize| (start + plan.count_frames(0..view)) * features;
    for (view, same_as) in plan.views.iter().enumerate().filter_map(|(view, plan)| Some((view, plan.same_as?))) {
        let from = place(same_as);
        samples.copy_within(from..from + plan.views[view].frames * features, place(view));
    }
}
