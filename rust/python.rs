//! The Python module `imagine_opd._rust`: with `python_fields` the only files that know `PyO3` and `NumPy`.

#![expect(clippy::needless_pass_by_value, reason = "arguments from Python are extracted as owned values")]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use numpy::ndarray::ArrayView2;
use numpy::{Element, PyArray2};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::batch::{self, Batch};
use crate::decode::Policy;
use crate::errors::ViewError;
use crate::fill::{Control, Shared};
use crate::header::Limits;
use crate::normalize::Sample;
use crate::plan::{Config, Row, RowPlan};
use crate::python_fields::{ConfigFields, ImageRef, RowFields, unknown};

/// How often a running batch looks for Ctrl-C and tells how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A batch of fewer pixels is done before it would be looked at.
const MAX_UNWATCHED_PIXELS: u64 = 6_000_000;

/// Pools by (process, threads asked for), and what all pools of a process share.
type Pools = (HashMap<(u32, usize), Arc<ThreadPool>>, HashMap<u32, Arc<Shared>>);

/// By process: neither threads nor the holders of a lock live on in a forked child, and data loaders fork. This lock is
/// only taken while the interpreter is held, so a fork never finds it taken by another thread.
static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

/// The pool of this many threads (0: one per core), made once per process.
fn get_pool(num_threads: usize) -> PyResult<Arc<ThreadPool>> {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let (pools, _) = pools.get_or_insert_default();
    let key = (std::process::id(), num_threads);
    if let Some(pool) = pools.get(&key) {
        return Ok(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(num_threads)
        .thread_name(|index| format!("imagine-views-{index}"))
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("cannot start {num_threads} threads: {error}")))?;
    let pool = Arc::new(pool);
    pools.insert(key, Arc::clone(&pool));
    Ok(pool)
}

/// What all batches of this process share.
fn get_shared() -> Arc<Shared> {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, shared) = pools.get_or_insert_default();
    Arc::clone(shared.entry(std::process::id()).or_default())
}

type Place = (usize, usize);
/// The place of the row's first patch or frame, per view (patches or frames, rows, columns), the views of student,
/// teacher and neutral teacher as (first, last + 1), crops (left, top, right, bottom, image), each box's crop, sizes.
type PyPlan = (
    usize,
    Vec<(usize, usize, usize)>,
    (Place, Place, Place),
    Vec<(u32, u32, u32, u32, usize)>,
    Vec<usize>,
    Vec<(u32, u32)>,
);

#[derive(IntoPyObject)]
enum RowResult {
    Plan(PyPlan),
    Failure((&'static str, String)),
}

fn hand_over(row: Result<(RowPlan, usize), ViewError>) -> RowResult {
    let (plan, start) = match row {
        Ok(row) => row,
        Err(error) => return RowResult::Failure((error.code(), error.to_string())),
    };
    let place = |views: Range<usize>| (views.start, views.end);
    let crops = plan.crops.iter().map(|&(region, image)| {
        (region.left, region.top, region.left + region.width, region.top + region.height, image)
    });
    RowResult::Plan((
        start,
        plan.views.iter().map(|view| (view.frames, view.grid.0, view.grid.1)).collect(),
        (place(plan.student), place(plan.teacher), place(plan.neutral)),
        crops.collect(),
        plan.crop_of_box,
        plan.sizes,
    ))
}

/// Makes a batch; a large one on a thread of its own, while this one answers to Ctrl-C and tells how far it is.
fn watch_batch<T: Sample>(
    py: Python<'_>,
    rows: &[Row<'_>],
    config: &Config,
    pool: &ThreadPool,
    shared: &Shared,
    progress: Option<&Py<PyAny>>,
) -> PyResult<Batch<T>> {
    let control = Control::default();
    let tell = |py: Python<'_>| {
        py.check_signals()?;
        if let Some(progress) = progress {
            let [done, total] = [&control.done, &control.total].map(|count| count.load(Ordering::Relaxed));
            progress.call1(py, (done, total))?;
        }
        Ok(())
    };
    let made: PyResult<Batch<T>> = py.detach(|| {
        let planned = batch::plan_rows(rows, config, pool);
        if progress.is_none() && planned.pixels(config) <= MAX_UNWATCHED_PIXELS {
            return Ok(batch::make_views::<T>(planned, config, pool, shared, &control));
        }
        std::thread::scope(|scope| {
            let (send, receive) = channel();
            let control = &control;
            let make = move || send.send(batch::make_views::<T>(planned, config, pool, shared, control));
            let maker = Builder::new()
                .name("imagine-batch".into())
                .spawn_scoped(scope, make)
                .map_err(|error| PyRuntimeError::new_err(format!("cannot start a thread: {error}")))?;
            let mut interrupted = Ok(());
            loop {
                match receive.recv_timeout(LOOK_EVERY) {
                    Ok(made) => return interrupted.map(|()| made),
                    Err(RecvTimeoutError::Disconnected) => {
                        // Joined here: otherwise the scope would panic too.
                        let _ = maker.join();
                        return Err(PyRuntimeError::new_err("the batch ended without a result"));
                    }
                    Err(RecvTimeoutError::Timeout) if interrupted.is_ok() => {
                        interrupted = Python::attach(tell);
                        control.cancelled.store(interrupted.is_err(), Ordering::Relaxed);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        })
    });
    let made = made?;
    tell(py)?;
    Ok(made)
}

/// Owns the samples of a batch for the arrays that show them; then their memory is kept for the next batch.
#[pyclass(frozen)]
struct Lease {
    give_back: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let give_back = self.give_back.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(give_back) = give_back.take() {
            give_back();
        }
    }
}

/// The samples from `lead` on as an array of rows of `features`.
fn lend_samples<T: Sample + Element>(
    py: Python<'_>,
    mut samples: Vec<T>,
    lead: usize,
    features: usize,
    shared: Arc<Shared>,
) -> PyResult<Bound<'_, PyAny>> {
    let shape = ((samples.len() - lead) / features, features);
    let start = samples[lead..].as_mut_ptr();
    let give_back = Box::new(move || shared.spare.give(samples));
    let lease = Bound::new(py, Lease { give_back: Mutex::new(Some(give_back)) })?;
    #[expect(unsafe_code, reason = "an array of memory that goes back where it came from")]
    // SAFETY: `shape` is what there is from `start` on; the memory stays where it is, untouched, until the lease is
    // dropped, which is the array's base and so outlives it.
    unsafe {
        let view = ArrayView2::from_shape_ptr(shape, start);
        Ok(PyArray2::borrow_from_array(&view, lease.into_any()).into_any())
    }
}

type MadeRows<'py> = (Bound<'py, PyAny>, Vec<RowResult>);

fn make_typed<'py, T: Sample + Element>(
    py: Python<'py>,
    rows: &[Row<'_>],
    config: &Config,
    num_threads: usize,
    progress: Option<&Py<PyAny>>,
) -> PyResult<MadeRows<'py>> {
    let (pool, shared) = (get_pool(num_threads)?, get_shared());
    let made = watch_batch::<T>(py, rows, config, &pool, &shared, progress)?;
    let features = config.layout().features();
    let samples = lend_samples(py, made.samples, made.lead, features, shared)?;
    Ok((samples, made.rows.into_iter().map(hand_over).collect()))
}

#[pyfunction]
#[pyo3(signature = (rows, config, student=true, progress=None))]
fn make_views<'py>(
    py: Python<'py>,
    rows: Vec<RowFields<'py>>,
    config: ConfigFields,
    student: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<MadeRows<'py>> {
    let built = config.build(student)?;
    let rows = rows.iter().map(RowFields::borrow).collect::<PyResult<Vec<_>>>()?;
    match config.output.as_str() {
        "float32" => make_typed::<f32>(py, &rows, &built, config.num_threads, progress.as_ref()),
        "bfloat16" => make_typed::<u16>(py, &rows, &built, config.num_threads, progress.as_ref()),
        "uint8" => make_typed::<u8>(py, &rows, &built, config.num_threads, progress.as_ref()),
        other => unknown("output", other),
    }
}

#[pyfunction]
#[pyo3(signature = (rows, config, student=true))]
fn plan_rows<'py>(
    py: Python<'py>,
    rows: Vec<RowFields<'py>>,
    config: ConfigFields,
    student: bool,
) -> PyResult<Vec<RowResult>> {
    let pool = get_pool(config.num_threads)?;
    let built = config.build(student)?;
    let rows = rows.iter().map(RowFields::borrow).collect::<PyResult<Vec<_>>>()?;
    let found = py.detach(|| batch::plan_rows(&rows, &built, &pool).plans);
    Ok(found.into_iter().map(|plan| hand_over(plan.map(|plan| (plan, 0)))).collect())
}

#[pyfunction]
fn read_size(py: Python<'_>, image: ImageRef<'_>) -> PyResult<(u32, u32)> {
    let source = image.borrow()?;
    // Whatever its size: what a view may cost is the config's business.
    let limits = Limits { max_pixels: u64::MAX, max_bytes: u64::MAX };
    let policy = Policy { alpha_white: false, exif: true };
    let probe = py.detach(|| source.probe(limits, policy));
    Ok(probe.map_err(|fault| PyValueError::new_err(fault.to_string()))?.size)
}

/// (views held, their bytes, hits so far) of this process's cache.
#[pyfunction]
fn cache_stats() -> (usize, usize, u64) {
    get_shared().cache.stats()
}

#[pyfunction]
fn clear_cache() {
    let shared = get_shared();
    shared.cache.clear();
    shared.spare.clear();
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::{cache_stats, clear_cache, make_views, plan_rows, read_size};
}
