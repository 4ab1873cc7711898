//! The Python module `imagine_opd._rust`: the only file that knows `PyO3` and `NumPy`.

#![expect(clippy::needless_pass_by_value, reason = "arguments from Python are extracted as owned values")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray2};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::batch::{self, Config, Row, RowPixels, Source};
use crate::errors::ViewError;
use crate::geometry::{CropRule, PixelBox};
use crate::header::Limits;
use crate::patchify::{Budget, Layout};

/// `types.ImageRef`.
#[derive(FromPyObject)]
enum ImageRef {
    Bytes(PyBackedBytes),
    Path(PathBuf),
}

impl ImageRef {
    fn borrow(&self) -> Source<'_> {
        match self {
            Self::Bytes(bytes) => Source::Bytes(bytes),
            Self::Path(path) => Source::Path(path.clone()),
        }
    }
}

/// `types.Box`, by its attributes.
#[derive(FromPyObject)]
struct BoxFields {
    x0: f64,
    y0: f64,
    x1: f64,
    y1: f64,
    image: i64,
}

/// `types.Row`, the part that concerns pixels.
#[derive(FromPyObject)]
struct RowFields {
    images: Vec<ImageRef>,
    boxes: Vec<BoxFields>,
}

/// `types.ViewConfig`, checked by `imagine_opd.views`.
#[derive(FromPyObject)]
struct ConfigFields {
    patch_size: usize,
    merge_size: usize,
    temporal_patch_size: usize,
    min_pixels: u64,
    max_pixels: u64,
    crop_min_pixels: Option<u64>,
    crop_max_pixels: Option<u64>,
    box_margin: f64,
    min_crop_px: u32,
    image_mean: [f64; 3],
    image_std: [f64; 3],
    max_image_pixels: u64,
    max_image_bytes: u64,
    num_threads: usize,
}

impl ConfigFields {
    fn build(&self) -> Config {
        Config {
            layout: Layout::new(
                self.patch_size,
                self.merge_size,
                self.temporal_patch_size,
                self.image_mean,
                self.image_std,
            ),
            budget: Budget { min_pixels: self.min_pixels, max_pixels: self.max_pixels },
            crop_budget: Budget {
                min_pixels: self.crop_min_pixels.unwrap_or(self.min_pixels),
                max_pixels: self.crop_max_pixels.unwrap_or(self.max_pixels),
            },
            crop_rule: CropRule { margin: self.box_margin, min_side: self.min_crop_px },
            limits: Limits { max_pixels: self.max_image_pixels, max_bytes: self.max_image_bytes },
        }
    }
}

impl RowFields {
    fn borrow(&self) -> Row<'_> {
        let images = self.images.iter().map(ImageRef::borrow);
        let boxes =
            self.boxes.iter().map(|&BoxFields { x0, y0, x1, y1, image }| PixelBox { x0, y0, x1, y1, image });
        Row { images: images.collect(), boxes: boxes.collect() }
    }
}

/// Pools by (process, threads asked for).
type Pools = HashMap<(u32, usize), Arc<ThreadPool>>;

/// The pool of this many threads (0: one per core), made once per process.
fn get_pool(num_threads: usize) -> PyResult<Arc<ThreadPool>> {
    // By process: threads do not live on in a forked child, and data loaders fork. The lock is only taken while
    // the interpreter is held, so a fork never finds it taken by another thread.
    static POOLS: Mutex<Option<Pools>> = Mutex::new(None);
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pools = pools.get_or_insert_default();
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

type Grids = Vec<(usize, usize)>;
/// pixel values, (rows, columns) per view, the student's patches, crops (left, top, right, bottom, image), sizes.
type PyPixels<'py> = (Bound<'py, PyArray2<f32>>, Grids, usize, Vec<(u32, u32, u32, u32, usize)>, Vec<(u32, u32)>);

#[derive(IntoPyObject)]
enum RowResult<'py> {
    Pixels(PyPixels<'py>),
    Failure((&'static str, String)),
}

fn hand_over(py: Python<'_>, row: Result<RowPixels, ViewError>, features: usize) -> PyResult<RowResult<'_>> {
    let row = match row {
        Ok(row) => row,
        Err(error) => return Ok(RowResult::Failure((error.code(), error.to_string()))),
    };
    let values = Array2::from_shape_vec((row.patches.len() / features, features), row.patches)
        .map_err(|error| PyRuntimeError::new_err(error.to_string()))?
        .into_pyarray(py);
    let crops = row.crops.iter().map(|&(region, image)| {
        (region.left, region.top, region.left + region.width, region.top + region.height, image)
    });
    Ok(RowResult::Pixels((values, row.grids, row.student_patches, crops.collect(), row.sizes)))
}

#[pyfunction]
fn make_views(py: Python<'_>, rows: Vec<RowFields>, config: ConfigFields) -> PyResult<Vec<RowResult<'_>>> {
    let pool = get_pool(config.num_threads)?;
    let config = config.build();
    let made = py.detach(|| {
        let rows: Vec<Row<'_>> = rows.iter().map(RowFields::borrow).collect();
        batch::make_views(&rows, &config, &pool)
    });
    made.into_iter().map(|row| hand_over(py, row, config.layout.features())).collect()
}

#[pyfunction]
fn check_rows(
    py: Python<'_>,
    rows: Vec<RowFields>,
    config: ConfigFields,
) -> PyResult<Vec<Option<(&'static str, String)>>> {
    let pool = get_pool(config.num_threads)?;
    let config = config.build();
    let found = py.detach(|| {
        let rows: Vec<Row<'_>> = rows.iter().map(RowFields::borrow).collect();
        batch::check_rows(&rows, &config, &pool)
    });
    Ok(found.into_iter().map(|error| error.map(|error| (error.code(), error.to_string()))).collect())
}

#[pyfunction]
fn read_size(py: Python<'_>, image: ImageRef) -> PyResult<(u32, u32)> {
    py.detach(|| batch::read_size(&image.borrow())).map_err(|fault| PyValueError::new_err(fault.to_string()))
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::{check_rows, make_views, read_size};
}
