//! Rows to pixels: plan from headers, decode each image once, write every view into its row's buffer, keep order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::decode::decode;
use crate::errors::{BoxFault, ImageFault, MAX_BOXES, MAX_ROW_BYTES, ViewError, allocate, catch_panic};
use crate::geometry::{CropRule, PixelBox, Region, place_crop};
use crate::header::{Header, Limits, name_io_fault, read_header};
use crate::patchify::{Budget, Layout};
use crate::resize::resize_region;
use crate::rgb::Rgb;

/// Where an encoded image is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source<'a> {
    Bytes(&'a [u8]),
    Path(PathBuf),
}

impl Source<'_> {
    /// The path, or for bytes the image's place in its row.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Bytes(bytes) => format!("{index} ({} bytes)", bytes.len()),
        }
    }
}

/// One row: its global images and the evidence boxes on them.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    pub images: Vec<Source<'a>>,
    pub boxes: Vec<PixelBox>,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub layout: Layout,
    pub budget: Budget,
    pub crop_budget: Budget,
    pub crop_rule: CropRule,
    pub limits: Limits,
}

/// The teacher's pixels of one row; the student's are the first `student_patches` patches.
#[derive(Debug, Clone, PartialEq)]
pub struct RowPixels {
    /// `[patches, features]`, the row's images in order, then the crops in box order.
    pub patches: Vec<f32>,
    /// (rows, columns) of patches, per view.
    pub grids: Vec<(usize, usize)>,
    pub student_patches: usize,
    /// The pixels that were cut, and from which image, per box.
    pub crops: Vec<(Region, usize)>,
    /// (width, height) after EXIF, per image.
    pub sizes: Vec<(u32, u32)>,
}

/// One view to make: a region of an image (an index into the distinct ones) at its final size.
struct ViewPlan {
    image: usize,
    region: Region,
    width: u32,
    height: u32,
}

struct RowPlan {
    views: Vec<ViewPlan>,
    crops: Vec<(Region, usize)>,
    sizes: Vec<(u32, u32)>,
}

/// A view and the part of its row's buffer that it fills.
struct Task<'b> {
    row: usize,
    view: &'b ViewPlan,
    out: &'b mut [f32],
}

/// Reads headers and checks boxes, without decoding: per row, why it would have no views.
#[must_use]
pub fn check_rows(rows: &[Row<'_>], config: &Config, pool: &ThreadPool) -> Vec<Option<ViewError>> {
    let (_, plans) = plan_rows(rows, config, pool);
    plans.into_iter().map(Result::err).collect()
}

/// Makes the views of every row; one result per row, in order.
#[must_use]
pub fn make_views(rows: &[Row<'_>], config: &Config, pool: &ThreadPool) -> Vec<Result<RowPixels, ViewError>> {
    let (images, plans) = plan_rows(rows, config, pool);
    let mut made: Vec<Result<RowPixels, ViewError>> = rows
        .iter()
        .zip(&plans)
        .map(|(row, plan)| {
            plan.as_ref().map_err(Clone::clone).and_then(|plan| open_row(row, plan, &config.layout))
        })
        .collect();
    let mut tasks: Vec<Vec<Task<'_>>> = images.iter().map(|_| Vec::new()).collect();
    for (row, (pixels, plan)) in made.iter_mut().zip(&plans).enumerate() {
        let (Ok(pixels), Ok(plan)) = (pixels, plan) else { continue };
        let mut rest = &mut pixels.patches[..];
        for (view, grid) in plan.views.iter().zip(&pixels.grids) {
            let (out, after) = rest.split_at_mut(grid.0 * grid.1 * config.layout.features());
            rest = after;
            tasks[view.image].push(Task { row, view, out });
        }
    }
    // Few images on many threads: the views of one image are spread too. Otherwise not, because a thread that
    // waits for its own views would start another image and hold two decoded ones.
    let spread_views = images.len() < pool.current_num_threads();
    let faults: Vec<(usize, usize, ImageFault)> = pool.install(|| {
        images
            .par_iter()
            .zip(tasks)
            .enumerate()
            .filter(|(_, (_, tasks))| !tasks.is_empty())
            .flat_map_iter(|(image, ((source, header), tasks))| {
                let owners: Vec<usize> = tasks.iter().map(|task| task.row).collect();
                let done = catch_panic(|| fill_tasks(source, header.as_ref(), tasks, config, spread_views));
                let fault = done.err();
                owners.into_iter().filter_map(move |row| Some((row, image, fault.clone()?)))
            })
            .collect()
    });
    for (row, image, fault) in faults {
        if made[row].is_ok() {
            let index = rows[row].images.iter().position(|source| *source == *images[image].0).unwrap_or(0);
            made[row] = Err(ViewError::Image { name: name_image(&rows[row], index), fault });
        }
    }
    made
}

/// The distinct images with their headers, and each row's plan.
type Planned<'r, 'a> = (Vec<(&'r Source<'a>, Result<Header, ImageFault>)>, Vec<Result<RowPlan, ViewError>>);

fn plan_rows<'r, 'a>(rows: &'r [Row<'a>], config: &Config, pool: &ThreadPool) -> Planned<'r, 'a> {
    let mut indices: HashMap<SourceKey<'r>, usize> = HashMap::new();
    let mut sources: Vec<&Source<'a>> = Vec::new();
    let mut uses: Vec<Vec<usize>> = Vec::with_capacity(rows.len());
    for row in rows {
        let found = row.images.iter().map(|source| {
            *indices.entry(SourceKey::of(source)).or_insert_with(|| {
                sources.push(source);
                sources.len() - 1
            })
        });
        uses.push(found.collect());
    }
    let headers: Vec<_> = pool.install(|| sources.par_iter().map(|source| probe(source, config.limits)).collect());
    let plans = rows.iter().zip(&uses).map(|(row, images)| plan_row(row, images, &headers, config)).collect();
    (sources.into_iter().zip(headers).collect(), plans)
}

/// What makes two sources the same image: the path, or the very same bytes in memory (not equal ones: comparing
/// megabytes costs more than it saves).
#[derive(PartialEq, Eq, Hash)]
enum SourceKey<'r> {
    Bytes(*const u8, usize),
    Path(&'r Path),
}

impl<'r> SourceKey<'r> {
    fn of(source: &'r Source<'_>) -> Self {
        match source {
            Source::Bytes(bytes) => Self::Bytes(bytes.as_ptr(), bytes.len()),
            Source::Path(path) => Self::Path(path),
        }
    }
}

fn plan_row(
    row: &Row<'_>,
    images: &[usize],
    headers: &[Result<Header, ImageFault>],
    config: &Config,
) -> Result<RowPlan, ViewError> {
    if images.is_empty() {
        return Err(ViewError::NoImage);
    }
    if row.boxes.len() > MAX_BOXES {
        return Err(ViewError::TooManyBoxes { found: row.boxes.len() });
    }
    let mut views = Vec::with_capacity(images.len() + row.boxes.len());
    let mut sizes = Vec::with_capacity(images.len());
    for (index, &image) in images.iter().enumerate() {
        let name_fault = |fault| ViewError::Image { name: name_image(row, index), fault };
        let (width, height) = headers[image].as_ref().map_err(|fault| name_fault(fault.clone()))?.size();
        let (out_width, out_height) = config
            .layout
            .smart_resize(width, height, config.budget)
            .ok_or_else(|| name_fault(ImageFault::Aspect { width, height }))?;
        sizes.push((width, height));
        let region = Region::whole(width, height);
        views.push(ViewPlan { image, region, width: out_width, height: out_height });
    }
    let mut crops = Vec::with_capacity(row.boxes.len());
    for pixel_box in &row.boxes {
        let name_fault = |fault| ViewError::Box { name: pixel_box.name(), fault };
        let index = usize::try_from(pixel_box.image)
            .ok()
            .filter(|&index| index < images.len())
            .ok_or_else(|| name_fault(BoxFault::NoSuchImage { image: pixel_box.image, count: images.len() }))?;
        let (width, height) = sizes[index];
        let region = place_crop(pixel_box, width, height, config.crop_rule).map_err(name_fault)?;
        let (width, height) = config
            .layout
            .smart_resize(region.width, region.height, config.crop_budget)
            .ok_or_else(|| name_fault(BoxFault::Aspect { width: region.width, height: region.height }))?;
        views.push(ViewPlan { image: images[index], region, width, height });
        crops.push((region, index));
    }
    let pixels: u64 = views.iter().map(|view| u64::from(view.width) * u64::from(view.height)).sum();
    let bytes = (pixels as usize).saturating_mul(3 * config.layout.temporal * size_of::<f32>());
    if bytes > MAX_ROW_BYTES {
        return Err(ViewError::TooManyViews { images: images.len(), boxes: row.boxes.len(), pixels, bytes });
    }
    Ok(RowPlan { views, crops, sizes })
}

/// The row's buffer, sizes known and pixels still to come.
fn open_row(row: &Row<'_>, plan: &RowPlan, layout: &Layout) -> Result<RowPixels, ViewError> {
    let grids: Vec<_> = plan.views.iter().map(|view| layout.grid(view.width, view.height)).collect();
    let count = |grids: &[(usize, usize)]| grids.iter().map(|(rows, columns)| rows * columns).sum::<usize>();
    let patches = allocate(count(&grids).saturating_mul(layout.features()))
        .map_err(|fault| ViewError::Image { name: name_image(row, 0), fault })?;
    let student_patches = count(&grids[..plan.sizes.len()]);
    Ok(RowPixels { patches, grids, student_patches, crops: plan.crops.clone(), sizes: plan.sizes.clone() })
}

/// Decodes one image and writes all its views.
fn fill_tasks(
    source: &Source<'_>,
    header: Result<&Header, &ImageFault>,
    tasks: Vec<Task<'_>>,
    config: &Config,
    spread_views: bool,
) -> Result<(), ImageFault> {
    let header = header.map_err(Clone::clone)?;
    let image = match source {
        Source::Bytes(bytes) => decode(bytes, header)?,
        Source::Path(path) => decode(&read_file(path, config.limits)?, header)?,
    };
    let fill = |task: Task<'_>| fill_view(&image, task.view, task.out, &config.layout);
    if spread_views { tasks.into_par_iter().try_for_each(fill) } else { tasks.into_iter().try_for_each(fill) }
}

fn fill_view(image: &Rgb, view: &ViewPlan, out: &mut [f32], layout: &Layout) -> Result<(), ImageFault> {
    let pixels = resize_region(image, view.region, view.width, view.height)?;
    layout.write_patches(&pixels, view.width, view.height, out);
    Ok(())
}

/// (width, height) of one image after EXIF, whatever its size: what a view may cost is the config's business.
pub fn read_size(source: &Source<'_>) -> Result<(u32, u32), ImageFault> {
    probe(source, Limits { max_pixels: u64::MAX, max_bytes: u64::MAX }).map(|header| header.size())
}

fn probe(source: &Source<'_>, limits: Limits) -> Result<Header, ImageFault> {
    catch_panic(|| match source {
        Source::Bytes(bytes) => {
            check_bytes(bytes.len() as u64, limits)?;
            read_header(Cursor::new(*bytes), limits)
        }
        Source::Path(path) => read_header(BufReader::new(open_file(path, limits)?), limits),
    })
}

fn open_file(path: &Path, limits: Limits) -> Result<File, ImageFault> {
    // Looked at before it is opened: opening a pipe would wait for its writer.
    let found = path.metadata().map_err(|error| name_io_fault(&error))?;
    if found.is_dir() {
        return Err(ImageFault::Unreadable("it is a directory".into()));
    }
    if !found.is_file() {
        return Err(ImageFault::Unreadable("it is not a regular file".into()));
    }
    check_bytes(found.len(), limits)?;
    File::open(path).map_err(|error| name_io_fault(&error))
}

fn read_file(path: &Path, limits: Limits) -> Result<Vec<u8>, ImageFault> {
    let mut bytes = Vec::new();
    let limit = limits.max_bytes.saturating_add(1);
    open_file(path, limits)?.take(limit).read_to_end(&mut bytes).map_err(|error| name_io_fault(&error))?;
    check_bytes(bytes.len() as u64, limits)?;
    Ok(bytes)
}

fn check_bytes(found: u64, limits: Limits) -> Result<(), ImageFault> {
    if found > limits.max_bytes {
        return Err(ImageFault::TooManyBytes { found, limit: limits.max_bytes });
    }
    Ok(())
}

fn name_image(row: &Row<'_>, index: usize) -> String {
    row.images[index].name(index)
}
