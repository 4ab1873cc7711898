//! Rows to plans: from headers and boxes alone, which views a row gets, how large they are, and where they go.

use std::ops::Range;

use crate::decode::Policy;
use crate::errors::{BoxFault, ImageFault, MAX_BOXES, MAX_ROW_BYTES, ViewError};
use crate::geometry::{CropRule, PixelBox, Region, merge_regions, place_crop, reading_order};
use crate::header::Limits;
use crate::looks::{Degrade, Highlight, Neutral, outline};
use crate::normalize::Scaling;
use crate::patchify::{Budget, Patches};
use crate::source::{Probe, Source};
use crate::steps::{Layout, Step};
use crate::tile::Tiling;
use crate::weights::{Filter, Parity};

/// One row: its global images and the evidence boxes on them.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    pub images: Vec<Source<'a>>,
    pub boxes: Vec<PixelBox>,
}

/// How an image of a family of models is cut up.
#[derive(Debug, Clone)]
pub enum Scheme {
    /// Qwen-VL: one size within a budget, cut in patches.
    Patches { patches: Patches, budget: Budget, crop_budget: Budget },
    /// The others: square frames.
    Tiles(Tiling),
}

/// How boxes become evidence crops.
#[derive(Debug, Clone, Copy)]
pub struct CropConfig {
    pub rule: CropRule,
    /// Crops that share more than this part of the smaller one are joined.
    pub merge_overlap: Option<f64>,
    /// In the order of reading instead of the order given.
    pub reading_order: bool,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub scheme: Scheme,
    pub filter: Filter,
    pub parity: Parity,
    pub scaling: Scaling,
    pub policy: Policy,
    pub crops: CropConfig,
    pub degrade: Degrade,
    /// On the teacher's global images, and whether on the student's too.
    pub highlight: Option<(Highlight, bool)>,
    pub neutral: Option<Neutral>,
    /// Whether the teacher sees the global images beside the crops.
    pub teacher_global: bool,
    /// Whether the student's views are wanted.
    pub student: bool,
    /// JPEGs may be decoded at half, a quarter or an eighth of their size.
    pub scaled_decode: bool,
    /// Of one number of the output.
    pub sample_bytes: usize,
    pub limits: Limits,
    pub cache_bytes: usize,
}

impl Config {
    #[must_use]
    pub fn layout(&self) -> Layout {
        match &self.scheme {
            Scheme::Patches { patches, .. } => Layout::Patches(*patches),
            Scheme::Tiles(tiling) => Layout::Frames(tiling.frame as usize),
        }
    }
}

/// One view to make: steps from a region of an image (an index into the distinct ones), and what comes of them.
#[derive(Debug, Clone)]
pub struct ViewPlan {
    pub image: usize,
    pub region: Region,
    pub steps: Vec<Step>,
    /// Patches or frames.
    pub frames: usize,
    /// (rows, columns) of patches, or of tiles: (0, 0) when the view is one frame.
    pub grid: (usize, usize),
    /// Made already: the same as this earlier view of the row.
    pub same_as: Option<usize>,
}

/// The views of a row in the order of its output. Each side is a run of them.
#[derive(Debug, Clone, Default)]
pub struct RowPlan {
    pub views: Vec<ViewPlan>,
    pub student: Range<usize>,
    pub teacher: Range<usize>,
    pub neutral: Range<usize>,
    /// The pixels that are cut, and from which image.
    pub crops: Vec<(Region, usize)>,
    /// For each box, its crop.
    pub crop_of_box: Vec<usize>,
    /// (width, height) of the upright images.
    pub sizes: Vec<(u32, u32)>,
}

impl RowPlan {
    /// Patches or frames of some views.
    #[must_use]
    pub fn count_frames(&self, views: Range<usize>) -> usize {
        self.views[views].iter().map(|view| view.frames).sum()
    }
}

/// Plans one row; `images` are its distinct images' places in `probes`.
pub fn plan_row(
    row: &Row<'_>,
    images: &[usize],
    probes: &[Result<Probe, ImageFault>],
    config: &Config,
) -> Result<RowPlan, ViewError> {
    if images.is_empty() {
        return Err(ViewError::NoImage);
    }
    if row.boxes.len() > MAX_BOXES {
        return Err(ViewError::TooManyBoxes { found: row.boxes.len() });
    }
    let mut sizes = Vec::with_capacity(images.len());
    for (index, &image) in images.iter().enumerate() {
        let probe = probes[image].as_ref().map_err(|fault| name_image(row, index, fault.clone()))?;
        sizes.push(probe.size);
    }
    let (crops, crop_of_box) = place_crops(row, &sizes, config)?;
    let planner = Planner { row, images, config, sizes: &sizes, crops: &crops, crop_of_box: &crop_of_box };
    let mut plan = planner.plan_views()?;
    plan.crops = crops;
    plan.crop_of_box = crop_of_box;
    plan.sizes = sizes;
    let frames = plan.count_frames(0..plan.views.len());
    let layout = config.layout();
    let bytes = frames.saturating_mul(layout.features()).saturating_mul(config.sample_bytes);
    if bytes > MAX_ROW_BYTES {
        let pixels = frames as u64 * layout.pixels() as u64;
        let (images, boxes) = (images.len(), row.boxes.len());
        return Err(ViewError::TooManyViews { images, boxes, pixels, bytes });
    }
    Ok(plan)
}

/// A fault of the image at `index` of a row.
#[must_use]
pub fn name_image(row: &Row<'_>, index: usize, fault: ImageFault) -> ViewError {
    ViewError::Image { name: row.images[index].name(index), fault }
}

/// Regions with their image's index, and for each box the place of its crop.
type Crops = (Vec<(Region, usize)>, Vec<usize>);

fn place_crops(row: &Row<'_>, sizes: &[(u32, u32)], config: &Config) -> Result<Crops, ViewError> {
    let mut crops = Vec::with_capacity(row.boxes.len());
    for pixel_box in &row.boxes {
        let name_fault = |fault| ViewError::Box { name: pixel_box.name(), fault };
        let index = usize::try_from(pixel_box.image)
            .ok()
            .filter(|&index| index < sizes.len())
            .ok_or_else(|| name_fault(BoxFault::NoSuchImage { image: pixel_box.image, count: sizes.len() }))?;
        let (width, height) = sizes[index];
        crops.push((place_crop(pixel_box, width, height, config.crops.rule).map_err(name_fault)?, index));
    }
    let CropConfig { merge_overlap, reading_order: ordered, .. } = config.crops;
    if merge_overlap.is_none() && !ordered {
        let places = (0..crops.len()).collect();
        return Ok((crops, places));
    }
    let mut placed = Vec::with_capacity(crops.len());
    let mut crop_of_box = vec![0; crops.len()];
    for image in 0..sizes.len() {
        let boxes: Vec<usize> = (0..crops.len()).filter(|&place| crops[place].1 == image).collect();
        let regions: Vec<Region> = boxes.iter().map(|&place| crops[place].0).collect();
        let merged = match merge_overlap {
            Some(overlap) => merge_regions(&regions, overlap),
            None => regions.iter().enumerate().map(|(place, &region)| (region, vec![place])).collect(),
        };
        let regions: Vec<Region> = merged.iter().map(|(region, _)| *region).collect();
        let order = if ordered { reading_order(&regions) } else { (0..regions.len()).collect() };
        for place in order {
            for &part in &merged[place].1 {
                crop_of_box[boxes[part]] = placed.len();
            }
            placed.push((regions[place], image));
        }
    }
    Ok((placed, crop_of_box))
}

struct Planner<'p, 'a> {
    row: &'p Row<'a>,
    images: &'p [usize],
    config: &'p Config,
    sizes: &'p [(u32, u32)],
    crops: &'p [(Region, usize)],
    crop_of_box: &'p [usize],
}

impl Planner<'_, '_> {
    fn plan_views(&self) -> Result<RowPlan, ViewError> {
        let Config { teacher_global, student, degrade, highlight, .. } = *self.config;
        let teacher_images = if teacher_global { self.images.len() } else { 0 } + self.crops.len();
        let (student_alone, teacher_alone) = (self.images.len() == 1, teacher_images == 1);
        let marked = |side: bool| highlight.filter(|_| side).map(|(highlight, _)| highlight);
        let on_student = marked(highlight.is_some_and(|(_, both)| both));
        let mut globals = Vec::new();
        for index in 0..if student { self.images.len() } else { 0 } {
            globals.push(self.plan_global(index, student_alone, on_student, degrade)?);
        }
        let plain = Degrade { scale: 1.0, blur_px: 0.0 };
        let mut teacher = Vec::new();
        for index in 0..if teacher_global { self.images.len() } else { 0 } {
            teacher.push(self.plan_global(index, teacher_alone, marked(true), plain)?);
        }
        let shared = student && teacher.iter().zip(&globals).all(|(a, b)| a.steps == b.steps) && teacher_global;
        let mut plan = RowPlan::default();
        if student {
            plan.views.append(&mut globals);
            plan.student = 0..self.images.len();
        }
        let start = if shared { 0 } else { plan.views.len() };
        if !shared {
            plan.views.append(&mut teacher);
        }
        for place in 0..self.crops.len() {
            let view = self.plan_crop(place, teacher_alone, None)?;
            plan.views.push(view);
        }
        plan.teacher = start..plan.views.len();
        if let Some(neutral) = self.config.neutral {
            for place in plan.teacher.clone().take(teacher_images - self.crops.len()) {
                let copy = ViewPlan { same_as: Some(place), ..plan.views[place].clone() };
                plan.views.push(copy);
            }
            for place in 0..self.crops.len() {
                let view = self.plan_crop(place, teacher_alone, Some(neutral))?;
                plan.views.push(view);
            }
            plan.neutral = plan.teacher.end..plan.views.len();
        }
        Ok(plan)
    }

    fn plan_global(
        &self,
        index: usize,
        alone: bool,
        highlight: Option<Highlight>,
        degrade: Degrade,
    ) -> Result<ViewPlan, ViewError> {
        let size = self.sizes[index];
        let (steps, frames, grid) = match &self.config.scheme {
            Scheme::Patches { patches, budget, .. } => self
                .cut_patches(*patches, size, *budget)
                .ok_or(ImageFault::Aspect { width: size.0, height: size.1 }),
            Scheme::Tiles(tiling) => cut_tiles(tiling, size, alone),
        }
        .map_err(|fault| name_image(self.row, index, fault))?;
        let steps = degrade.wrap(steps, size, self.config.filter);
        let steps = if let Some(highlight) = highlight {
            let on_it = self.crops.iter().filter(|(_, image)| *image == index);
            let regions: Vec<Region> = on_it.map(|(region, _)| *region).collect();
            outline(steps, size, &regions, highlight)
        } else {
            steps
        };
        let region = Region::whole(size.0, size.1);
        Ok(ViewPlan { image: self.images[index], region, steps, frames, grid, same_as: None })
    }

    fn plan_crop(&self, place: usize, alone: bool, neutral: Option<Neutral>) -> Result<ViewPlan, ViewError> {
        let (region, index) = self.crops[place];
        let size = (region.width, region.height);
        let (steps, frames, grid) = match &self.config.scheme {
            Scheme::Patches { patches, crop_budget, .. } => self
                .cut_patches(*patches, size, *crop_budget)
                .ok_or(BoxFault::Aspect { width: size.0, height: size.1 }),
            Scheme::Tiles(tiling) => {
                cut_tiles(tiling, size, alone).map_err(|fault| BoxFault::Untileable(fault.to_string()))
            }
        }
        .map_err(|fault| {
            let box_of_it = self.crop_of_box.iter().position(|&crop| crop == place).unwrap_or(0);
            ViewError::Box { name: self.row.boxes[box_of_it].name(), fault }
        })?;
        let steps = match neutral {
            Some(neutral) => neutral.wrap(steps, size, self.config.filter),
            None => steps,
        };
        Ok(ViewPlan { image: self.images[index], region, steps, frames, grid, same_as: None })
    }

    fn cut_patches(&self, patches: Patches, size: (u32, u32), budget: Budget) -> Option<Cut> {
        let to = patches.smart_resize(size.0, size.1, budget)?;
        let write = Step::Write { first: 0 };
        let step =
            if to == size { write } else { Step::Resize { to, filter: self.config.filter, next: vec![write] } };
        let grid = patches.grid(to.0, to.1);
        Some((vec![step], grid.0 * grid.1, grid))
    }
}

/// Steps, patches or frames, and their grid.
type Cut = (Vec<Step>, usize, (usize, usize));

fn cut_tiles(tiling: &Tiling, size: (u32, u32), alone: bool) -> Result<Cut, ImageFault> {
    let cut = tiling.cut(size.0, size.1, alone).map_err(|fault| ImageFault::Untileable(fault.to_string()))?;
    Ok((cut.steps, cut.frames, cut.grid))
}
