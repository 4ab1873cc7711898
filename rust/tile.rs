//! How an image is cut into square frames by the families that tile: from its size to a tree of steps; no pixels.
//!
//! Each rule is that of transformers' image processor of the family, float for float: the same divisions, products
//! and roundings in the same order, because one ulp decides between two grids.

use thiserror::Error;

use crate::geometry::Region;
use crate::grids::{Size, choose_grid, choose_pinpoint, fit_inside, fit_longest_edge, whole_tiles};
use crate::steps::Step;
use crate::weights::Filter;

/// Most tiles of one image; real models have at most a few dozen.
pub const MAX_TILES: u64 = 1024;
/// Most pixels of a resized or padded picture: a thin image padded to a square grows without bound.
pub const MAX_PICTURE_PIXELS: u64 = 1 << 30;
/// Longest side of an image that is cut; of the formats only PNG goes over 65 535. A line of pixels of any length may
/// come out of a few kilobytes, and resizing it to frames takes minutes and gigabytes.
pub const MAX_SIDE_PX: u32 = 1 << 17;

/// Whose rule of tiling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// A grid near the image's aspect, which is not kept; then the whole image, when there are several tiles.
    Internvl,
    /// The whole image; then the tiles of the best pinpoint, aspect kept, black bars.
    LlavaNext,
    /// As `LlavaNext`, for the only image of a sample; else one frame, padded to a square with the mean colour.
    LlavaOnevision,
    /// Up or down to a longest edge, on to whole tiles; then the whole of that, when there are several tiles.
    Idefics3,
    /// The whole image; then crops along its longer side.
    Gemma3,
}

/// How images are cut into frames; each family reads its own parameters only.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiling {
    pub family: Family,
    /// Side of a frame in pixels.
    pub frame: u32,
    pub filter: Filter,
    /// Off: one frame an image.
    pub split: bool,
    /// `InternVL`: bounds of rows × columns.
    pub min_tiles: u32,
    pub max_tiles: u32,
    /// `LLaVA`: (height, width) in pixels, multiples of `frame`.
    pub pinpoints: Vec<(u32, u32)>,
    /// Idefics3: what the longer side is resized to first.
    pub longest_edge_px: u32,
    /// Gemma 3: least side of a crop, most crops, and the least aspect that is cropped.
    pub min_crop_px: u32,
    pub max_crops: u32,
    pub min_ratio: f64,
    /// `LLaVA-OneVision`: the colour around an image that is padded to a square.
    pub fill: [u8; 3],
}

/// What becomes of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Cut {
    pub steps: Vec<Step>,
    pub frames: usize,
    /// Rows and columns of tiles; (0, 0) when the image is one frame.
    pub grid: (usize, usize),
}

/// Why an image cannot be cut; the sentence goes on after the image's name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TileFault {
    #[error("cannot be cut: {name} is 0; expected at least 1")]
    Zero { name: &'static str },
    #[error("may be cut into {tiles} tiles, over the {MAX_TILES} of one image; lower the tiling's bounds")]
    TooManyTiles { tiles: u64 },
    #[error(
        "would become {width}x{height} pixels on the way, over the {MAX_PICTURE_PIXELS} of a picture; crop it or shrink the tiling's sizes"
    )]
    TooLarge { width: u64, height: u64 },
    #[error("is {width}x{height} pixels, with a side over the {MAX_SIDE_PX} of an image that is cut; crop it")]
    TooLong { width: u32, height: u32 },
    #[error("fits no pinpoint; expected pinpoints whose sides are multiples of the frame's {frame} pixels")]
    NoPinpoint { frame: u32 },
    #[error("is {width}x{height} pixels, too few for {crops} crops; raise min_crop_px or lower max_crops")]
    EmptyCrop { width: u32, height: u32, crops: u64 },
}

impl Tiling {
    /// How an image of `width` × `height` pixels is cut; `alone`: it is the only image of its sample.
    pub fn cut(&self, width: u32, height: u32, alone: bool) -> Result<Cut, TileFault> {
        for (name, value) in [("width", width), ("height", height), ("frame_px", self.frame)] {
            if value == 0 {
                return Err(TileFault::Zero { name });
            }
        }
        bound_picture(self.frame.into(), self.frame.into())?;
        let image = (width, height);
        let cut = match (self.family, self.split) {
            (Family::LlavaOnevision, split) if !(split && alone) => self.cut_padded(image),
            (Family::Idefics3, split) => self.cut_idefics3(image, split),
            (_, false) => Ok(self.cut_whole(image)),
            (Family::Internvl, true) => self.cut_internvl(image),
            (Family::LlavaNext | Family::LlavaOnevision, true) => self.cut_llava(image),
            (Family::Gemma3, true) => self.cut_gemma3(image),
        }?;
        if width.max(height) > MAX_SIDE_PX { Err(TileFault::TooLong { width, height }) } else { Ok(cut) }
    }

    /// One frame: the image squashed.
    fn cut_whole(&self, image: Size) -> Cut {
        Cut { steps: self.write_whole(image, 0), frames: 1, grid: (0, 0) }
    }

    fn cut_internvl(&self, image: Size) -> Result<Cut, TileFault> {
        let most = u64::from(self.max_tiles);
        if most > MAX_TILES {
            return Err(TileFault::TooManyTiles { tiles: most });
        }
        let (rows, columns) = choose_grid(image, self.frame, self.min_tiles, self.max_tiles);
        let tiles = bound_tiles(rows, columns)?;
        if tiles == 1 {
            return Ok(self.cut_whole(image));
        }
        let to = bound_picture(columns * u64::from(self.frame), rows * u64::from(self.frame))?;
        let mut steps = self.resize(image, to, vec![Step::Write { first: 0 }]);
        steps.extend(self.write_whole(image, tiles));
        Ok(Cut { steps, frames: tiles + 1, grid: (rows as usize, columns as usize) })
    }

    fn cut_llava(&self, image: Size) -> Result<Cut, TileFault> {
        let (rows, columns, canvas) = self.pick_pinpoint(image)?;
        let tiles = bound_tiles(rows, columns)?;
        let inner = fit_inside(image, canvas);
        let write = vec![Step::Write { first: 1 }];
        let mut steps = self.write_whole(image, 0);
        steps.extend(self.resize(image, inner, pad(inner, canvas, [0; 3], write)));
        Ok(Cut { steps, frames: tiles + 1, grid: (rows as usize, columns as usize) })
    }

    /// The best pinpoint: its rows and columns of tiles and its size.
    fn pick_pinpoint(&self, image: Size) -> Result<(u64, u64, Size), TileFault> {
        let fault = TileFault::NoPinpoint { frame: self.frame };
        let (width, height) = choose_pinpoint(image, &self.pinpoints).ok_or(fault.clone())?;
        if width == 0 || height == 0 || width % self.frame != 0 || height % self.frame != 0 {
            return Err(fault);
        }
        let canvas = bound_picture(width.into(), height.into())?;
        Ok((u64::from(height / self.frame), u64::from(width / self.frame), canvas))
    }

    /// One frame: the image in the middle of a square.
    fn cut_padded(&self, (width, height): Size) -> Result<Cut, TileFault> {
        let side = u64::from(width.max(height));
        let square = bound_picture(side, side)?;
        let steps = pad((width, height), square, self.fill, self.write_whole(square, 0));
        Ok(Cut { steps, frames: 1, grid: (0, 0) })
    }

    fn cut_idefics3(&self, image: Size, split: bool) -> Result<Cut, TileFault> {
        if self.longest_edge_px == 0 {
            return Err(TileFault::Zero { name: "longest_edge_px" });
        }
        let fitted = fit_longest_edge(image, self.longest_edge_px);
        let fitted = bound_picture(fitted.0, fitted.1)?;
        if !split {
            let steps = self.resize(image, fitted, self.write_whole(fitted, 0));
            return Ok(Cut { steps, frames: 1, grid: (0, 0) });
        }
        let (width, height) = whole_tiles(fitted, self.frame.into());
        let (rows, columns) = (height / u64::from(self.frame), width / u64::from(self.frame));
        let tiles = bound_tiles(rows, columns)?;
        let whole = bound_picture(width, height)?;
        let mut next = vec![Step::Write { first: 0 }];
        if tiles > 1 {
            next.extend(self.write_whole(whole, tiles));
        }
        // Two resizes, each rounded to bytes: one in their place would not give the same pixels.
        let steps = self.resize(image, fitted, self.resize(fitted, whole, next));
        Ok(if tiles > 1 {
            Cut { steps, frames: tiles + 1, grid: (rows as usize, columns as usize) }
        } else {
            Cut { steps, frames: 1, grid: (0, 0) }
        })
    }

    fn cut_gemma3(&self, image: Size) -> Result<Cut, TileFault> {
        for (name, value) in [("min_crop_px", self.min_crop_px), ("max_crops", self.max_crops)] {
            if value == 0 {
                return Err(TileFault::Zero { name });
            }
        }
        let (width, height) = image;
        let wide = width >= height;
        let (long, short) = if wide { (width, height) } else { (height, width) };
        let ratio = f64::from(long) / f64::from(short);
        let least = f64::from(self.min_crop_px);
        if ratio < self.min_ratio {
            return Ok(self.cut_whole(image));
        }
        let crops = ((ratio + 0.5).floor() as u64).min((f64::from(long) / least).floor() as u64);
        let crops = crops.max(2).min(self.max_crops.into());
        let side = (f64::from(long) / crops as f64).ceil();
        if side.min(short.into()) < least {
            return Ok(self.cut_whole(image));
        }
        let tiles = bound_tiles(crops, 1)?;
        let side = side as u32; // at most `long`
        let mut steps = self.write_whole(image, 0);
        for index in 0..tiles {
            // At most MAX_TILES × `long`.
            let at = u64::from(side) * index as u64;
            if at >= u64::from(long) {
                return Err(TileFault::EmptyCrop { width, height, crops });
            }
            let (at, rest) = (at as u32, long - at as u32);
            let region = if wide {
                Region { left: at, top: 0, width: side.min(rest), height }
            } else {
                Region { left: 0, top: at, width, height: side.min(rest) }
            };
            let next = self.write_whole((region.width, region.height), index + 1);
            steps.push(Step::Crop { region, next });
        }
        Ok(Cut { steps, frames: tiles + 1, grid: if wide { (1, tiles) } else { (tiles, 1) } })
    }

    /// The picture squashed into frame `first`.
    fn write_whole(&self, picture: Size, first: usize) -> Vec<Step> {
        self.resize(picture, (self.frame, self.frame), vec![Step::Write { first }])
    }

    /// `next` after a resize; left out where it would change nothing.
    fn resize(&self, from: Size, to: Size, next: Vec<Step>) -> Vec<Step> {
        if from == to { next } else { vec![Step::Resize { to, filter: self.filter, next }] }
    }
}

/// `LLaVA-OneVision`'s colour around a padded image: the mean, as transformers makes bytes of it.
#[must_use]
pub fn fill_of(mean: [f64; 3]) -> [u8; 3] {
    mean.map(|value| (value * 255.0) as u8)
}

/// `next` after the picture is put in the middle of `to`; left out where it would change nothing.
fn pad(from: Size, to: Size, fill: [u8; 3], next: Vec<Step>) -> Vec<Step> {
    if from == to {
        return next;
    }
    vec![Step::Pad { left: (to.0 - from.0) / 2, top: (to.1 - from.1) / 2, to, fill, next }]
}

fn bound_tiles(rows: u64, columns: u64) -> Result<usize, TileFault> {
    let tiles = rows.saturating_mul(columns);
    if tiles > MAX_TILES { Err(TileFault::TooManyTiles { tiles }) } else { Ok(tiles as usize) }
}

/// The size as whole pixels, when a picture may have it.
fn bound_picture(width: u64, height: u64) -> Result<Size, TileFault> {
    if width.saturating_mul(height) > MAX_PICTURE_PIXELS {
        return Err(TileFault::TooLarge { width, height });
    }
    Ok((width as u32, height as u32))
}

#[cfg(test)]
#[path = "tile_tests.rs"]
mod tests;
