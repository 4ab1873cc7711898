//! What Python hands over, by its attributes: rows, configs and images as `imagine_opd.types` has them.

use std::path::PathBuf;

use numpy::{PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use crate::decode::Policy;
use crate::geometry::{CropRule, PixelBox};
use crate::header::Limits;
use crate::looks::{Degrade, Highlight, Neutral};
use crate::normalize::Scaling;
use crate::patchify::{Budget, Patches};
use crate::plan::{Config, CropConfig, Row, Scheme};
use crate::source::Source;
use crate::tile::{Family, Tiling, fill_of};
use crate::weights::{Filter, Parity};

/// `types.ImageRef`, or RGB8 pixels `[height, width, 3]`.
#[derive(FromPyObject)]
pub enum ImageRef<'py> {
    Bytes(PyBackedBytes),
    Pixels(PyReadonlyArray3<'py, u8>),
    Path(PathBuf),
}

impl ImageRef<'_> {
    pub fn borrow(&self) -> PyResult<Source<'_>> {
        Ok(match self {
            Self::Bytes(bytes) => Source::Bytes(bytes),
            Self::Path(path) => Source::Path(path.clone()),
            Self::Pixels(array) => {
                let &[height, width, channels] = array.shape() else { unreachable!("three dimensions") };
                // Columns first is contiguous too, but no rows of pixels.
                let pixels = array.as_slice().ok().filter(|_| array.is_c_contiguous()).ok_or_else(|| {
                    let text = "its rows are not one after the other; pass numpy.ascontiguousarray of it";
                    PyValueError::new_err(format!("an image array has shape {:?}, but {text}", array.shape()))
                })?;
                let (Ok(width), Ok(height), 3) = (u32::try_from(width), u32::try_from(height), channels) else {
                    let text =
                        format!("an image array has shape {:?}; expected (height, width, 3)", array.shape());
                    return Err(PyValueError::new_err(text));
                };
                Source::Pixels { pixels, width, height }
            }
        })
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
pub struct RowFields<'py> {
    images: Vec<ImageRef<'py>>,
    boxes: Vec<BoxFields>,
}

impl RowFields<'_> {
    pub fn borrow(&self) -> PyResult<Row<'_>> {
        let images = self.images.iter().map(ImageRef::borrow).collect::<PyResult<_>>()?;
        let boxes =
            self.boxes.iter().map(|&BoxFields { x0, y0, x1, y1, image }| PixelBox { x0, y0, x1, y1, image });
        Ok(Row { images, boxes: boxes.collect() })
    }
}

/// `types.Tiling`.
#[derive(FromPyObject)]
struct TilingFields {
    family: String,
    frame_px: u32,
    split: bool,
    min_tiles: u32,
    max_tiles: u32,
    pinpoints: Vec<(u32, u32)>,
    longest_edge_px: u32,
    min_crop_px: u32,
    max_crops: u32,
    min_ratio: f64,
}

/// `types.ViewConfig`, checked by `imagine_opd.views`.
#[derive(FromPyObject)]
#[expect(clippy::struct_excessive_bools, reason = "one of each field")]
pub struct ConfigFields {
    patch_size: usize,
    merge_size: usize,
    temporal_patch_size: usize,
    min_pixels: u64,
    max_pixels: u64,
    crop_min_pixels: Option<u64>,
    crop_max_pixels: Option<u64>,
    tiling: Option<TilingFields>,
    resample: String,
    parity: String,
    rescale_factor: f64,
    image_mean: [f64; 3],
    image_std: [f64; 3],
    pub output: String,
    box_margin: f64,
    min_crop_px: u32,
    merge_overlap: Option<f64>,
    reading_order: bool,
    teacher_global: bool,
    highlight: String,
    highlight_width: f64,
    highlight_colour: [u8; 3],
    student_scale: f64,
    student_blur_px: f64,
    neutral: String,
    alpha: String,
    exif: bool,
    scaled_decode: bool,
    max_image_pixels: u64,
    max_image_bytes: u64,
    cache_bytes: usize,
    pub num_threads: usize,
}

pub fn unknown<T>(name: &str, value: &str) -> PyResult<T> {
    Err(PyValueError::new_err(format!("{name} is {value:?}, which is not known")))
}

impl ConfigFields {
    pub fn build(&self, student: bool) -> PyResult<Config> {
        let filter = match self.resample.as_str() {
            "bilinear" => Filter::Bilinear,
            "bicubic" => Filter::Bicubic,
            "lanczos" => Filter::Lanczos,
            other => unknown("resample", other)?,
        };
        let parity = match self.parity.as_str() {
            "torchvision" => Parity::Torchvision,
            "pillow" => Parity::Pillow,
            "pillow12" => Parity::Pillow12,
            other => unknown("parity", other)?,
        };
        let neutral = match self.neutral.as_str() {
            "none" => None,
            "mean" => Some(Neutral::Mean),
            "blur" => Some(Neutral::Blur),
            "low_resolution" => Some(Neutral::LowResolution),
            other => unknown("neutral", other)?,
        };
        let highlight = Highlight { width_share: self.highlight_width, colour: self.highlight_colour };
        let highlight = match self.highlight.as_str() {
            "none" => None,
            "teacher" => Some((highlight, false)),
            "both" => Some((highlight, true)),
            other => unknown("highlight", other)?,
        };
        Ok(Config {
            scheme: self.build_scheme(filter)?,
            filter,
            parity,
            scaling: Scaling { mean: self.image_mean, std: self.image_std, rescale_factor: self.rescale_factor },
            policy: Policy { alpha_white: self.alpha == "white", exif: self.exif },
            crops: CropConfig {
                rule: CropRule { margin: self.box_margin, min_side: self.min_crop_px },
                merge_overlap: self.merge_overlap,
                reading_order: self.reading_order,
            },
            degrade: Degrade { scale: self.student_scale, blur_px: self.student_blur_px },
            highlight,
            neutral,
            teacher_global: self.teacher_global,
            student,
            scaled_decode: self.scaled_decode,
            sample_bytes: match self.output.as_str() {
                "float32" => 4,
                "bfloat16" => 2,
                _ => 1,
            },
            limits: Limits { max_pixels: self.max_image_pixels, max_bytes: self.max_image_bytes },
            cache_bytes: self.cache_bytes,
        })
    }

    fn build_scheme(&self, filter: Filter) -> PyResult<Scheme> {
        let Some(tiling) = &self.tiling else {
            // Raw bytes are repeated in time where they are normalised.
            let temporal = if self.output == "uint8" { 1 } else { self.temporal_patch_size };
            return Ok(Scheme::Patches {
                patches: Patches { side: self.patch_size, merge: self.merge_size, temporal },
                budget: Budget { min_pixels: self.min_pixels, max_pixels: self.max_pixels },
                crop_budget: Budget {
                    min_pixels: self.crop_min_pixels.unwrap_or(self.min_pixels),
                    max_pixels: self.crop_max_pixels.unwrap_or(self.max_pixels),
                },
            });
        };
        let family = match tiling.family.as_str() {
            "internvl" => Family::Internvl,
            "llava_next" => Family::LlavaNext,
            "llava_onevision" => Family::LlavaOnevision,
            "idefics3" => Family::Idefics3,
            "gemma3" => Family::Gemma3,
            other => unknown("family", other)?,
        };
        Ok(Scheme::Tiles(Tiling {
            family,
            frame: tiling.frame_px,
            filter,
            split: tiling.split,
            min_tiles: tiling.min_tiles,
            max_tiles: tiling.max_tiles,
            pinpoints: tiling.pinpoints.clone(),
            longest_edge_px: tiling.longest_edge_px,
            min_crop_px: tiling.min_crop_px,
            max_crops: tiling.max_crops,
            min_ratio: tiling.min_ratio,
            fill: fill_of(self.image_mean),
        }))
    }
}
