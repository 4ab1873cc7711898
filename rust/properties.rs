//! What holds for every input: properties of geometry, plans, resizing and writing, on inputs drawn at random.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::convolve::Kernel;
use crate::geometry::{CropRule, PixelBox, Region, merge_regions, place_crop, reading_order};
use crate::normalize::{Normalizer, Scaling, unwritten};
use crate::orient::Orientation;
use crate::patchify::{Budget, Patches};
use crate::resize::Resize;
use crate::rgb::{BYTES, Rgb, Rows};
use crate::steps::{Layout, Step, Work};
use crate::tile::{Family, Tiling};
use crate::weights::{Filter, Parity};

const PARITIES: [Parity; 3] = [Parity::Torchvision, Parity::Pillow, Parity::Pillow12];
const FAMILIES: [Family; 5] =
    [Family::Internvl, Family::LlavaNext, Family::LlavaOnevision, Family::Idefics3, Family::Gemma3];
const SCALING: Scaling = Scaling { mean: [0.5; 3], std: [0.5; 3], rescale_factor: 1.0 / 255.0 };

fn filters() -> impl Strategy<Value = Filter> {
    // A narrower one is for pictures that keep their size: between the pixels of another it has no weight.
    let sigma = (0.5..5.0).prop_map(|sigma| Filter::Gaussian { sigma });
    prop_oneof![select(vec![Filter::Bilinear, Filter::Bicubic, Filter::Lanczos, Filter::Box]), sigma]
}

fn sizes(most: u32) -> impl Strategy<Value = (u32, u32)> {
    (1..=most, 1..=most)
}

fn images(most: u32) -> impl Strategy<Value = Rgb> {
    sizes(most).prop_flat_map(|(width, height)| {
        let len = width as usize * height as usize * BYTES;
        // Black and white as often as all other values: there sums overshoot.
        let byte = prop_oneof![Just(0), Just(255), any::<u8>()];
        vec(byte, len).prop_map(move |pixels| Rgb { width, height, pixels })
    })
}

fn regions(width: u32, height: u32) -> impl Strategy<Value = Region> {
    (0..width, 0..height).prop_flat_map(move |(left, top)| {
        (1..=width - left, 1..=height - top).prop_map(move |(width, height)| Region { left, top, width, height })
    })
}

/// The rows of `region`, in runs that are cut after `cuts` rows, over and over.
fn runs<'a>(rows: Rows<'a>, region: Region, cuts: &[usize]) -> Vec<Rows<'a>> {
    let (mut found, mut top) = (Vec::new(), 0);
    for count in cuts.iter().cycle() {
        if top >= region.height {
            return found;
        }
        let height = (*count as u32).min(region.height - top);
        found.extend(rows.window(0, Region { top: region.top + top, height, ..region }));
        top += height;
    }
    found
}

fn resize(
    pushes: &[Rows<'_>],
    from: (u32, u32),
    to: (u32, u32),
    how: (Filter, Parity),
    kernel: Kernel,
) -> Vec<u8> {
    let mut resize = Resize::with_kernel(from, to, how.0, how.1, kernel).unwrap();
    let mut pixels = Vec::new();
    for rows in pushes {
        let take = &mut |rows: Rows<'_>| {
            pixels.extend(rows.iter().flatten());
            Ok(())
        };
        resize.push(*rows, take).unwrap();
    }
    pixels
}

fn covers(outer: &Region, inner: &Region) -> bool {
    outer.around(inner) == *outer
}

/// Budgets from the least to the most, and patches.
fn layouts() -> impl Strategy<Value = (Patches, Budget)> {
    let patches = (1..40_usize, 1..4_usize, 1..3_usize);
    (patches, 1..4_000_000_u64, 1..4_000_000_u64).prop_map(|((side, merge, temporal), a, b)| {
        (Patches { side, merge, temporal }, Budget { min_pixels: a.min(b), max_pixels: a.max(b) })
    })
}

fn tilings() -> impl Strategy<Value = Tiling> {
    let numbers = (1..40_u32, 1..5_u32, 1..12_u32, 1..90_u32, 1..30_u32, 1..9_u32);
    let pinpoints = vec((1..5_u32, 1..5_u32), 1..5);
    (select(&FAMILIES[..]), any::<bool>(), numbers, pinpoints, 0.0..3.0).prop_map(
        |(family, split, numbers, pinpoints, min_ratio)| {
            let (frame, min_tiles, max_tiles, longest_edge_px, min_crop_px, max_crops) = numbers;
            let pinpoints = pinpoints.into_iter().map(|(rows, columns)| (rows * frame, columns * frame)).collect();
            let (filter, fill) = (Filter::Bilinear, [1, 2, 3]);
            Tiling {
                family,
                frame,
                filter,
                split,
                min_tiles,
                max_tiles,
                pinpoints,
                longest_edge_px,
                min_crop_px,
                max_crops,
                min_ratio,
                fill,
            }
        },
    )
}

/// Counts the frames that steps write, on the way checking that no picture is empty.
fn count_written(steps: &[Step], size: (u32, u32), frame: u32) -> u32 {
    assert!(size.0 > 0 && size.1 > 0, "{steps:?}");
    let count = |step: &Step| match step {
        Step::Resize { to, next, .. } | Step::Pad { to, next, .. } => count_written(next, *to, frame),
        Step::Crop { region, next } => count_written(next, (region.width, region.height), frame),
        Step::Outline { next, .. } => count_written(next, size, frame),
        Step::Write { .. } => (size.0 / frame) * (size.1 / frame),
    };
    steps.iter().map(count).sum()
}

/// Pushes a picture through steps; what was not written is a NaN.
fn write(steps: &[Step], image: &Rgb, layout: Layout, frames: usize, cuts: &[usize]) -> Vec<f32> {
    let normalizer = Normalizer::new(SCALING, Parity::Torchvision);
    let mut samples = vec![f32::NAN; frames * layout.features()];
    let size = (image.width, image.height);
    let mut work = Work::new(steps, size, layout, Parity::Torchvision, &normalizer).unwrap();
    for rows in runs(image.rows(), Region::whole(size.0, size.1), cuts) {
        work.push(rows, unwritten(&mut samples)).unwrap();
    }
    samples
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    vec(1..20_usize, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn resized_region_is_the_same_whatever_the_kernel_and_the_runs(
        (image, region) in images(60).prop_flat_map(|image| {
            let region = regions(image.width, image.height);
            (Just(image), region)
        }),
        to in sizes(70),
        filter in filters(),
        parity in select(&PARITIES[..]),
        cuts in cuts(),
    ) {
        let from = (region.width, region.height);
        let copy: Vec<u8> = runs(image.rows(), region, &[60]).iter().flat_map(|rows| rows.iter().flatten()).copied().collect();
        let copy = Rgb { width: from.0, height: from.1, pixels: copy };
        let plain = resize(&[copy.rows()], from, to, (filter, parity), Kernel::Portable);
        let found = resize(&runs(image.rows(), region, &cuts), from, to, (filter, parity), Kernel::detect());
        prop_assert_eq!(plain.len(), to.0 as usize * to.1 as usize * BYTES);
        prop_assert!(plain == found);
    }

    #[test]
    fn one_colour_stays_that_colour_at_every_size(
        from in sizes(90),
        to in sizes(90),
        colour in any::<[u8; 3]>(),
        filter in filters(),
        parity in select(&PARITIES[..]),
    ) {
        let pixels = colour.repeat(from.0 as usize * from.1 as usize);
        let image = Rgb { width: from.0, height: from.1, pixels };
        let found = resize(&[image.rows()], from, to, (filter, parity), Kernel::detect());
        prop_assert!(found.as_chunks().0.iter().all(|pixel| *pixel == colour), "{:?}", &found[..3]);
    }

    #[test]
    fn own_size_gives_the_pixels_back(image in images(50), parity in select(&PARITIES[..]), cuts in cuts()) {
        let size = (image.width, image.height);
        let pushes = runs(image.rows(), Region::whole(size.0, size.1), &cuts);
        for filter in [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos, Filter::Box] {
            prop_assert_eq!(&resize(&pushes, size, size, (filter, parity), Kernel::detect()), &image.pixels);
        }
    }

    #[test]
    fn crop_covers_its_box_inside_the_image(
        (width, height) in sizes(5000),
        sides in any::<[(u16, u16); 2]>(),
        margin in 0.0..4.0,
        min_side in 1..6000_u32,
    ) {
        let place = |size: u32, share: u16| f64::from(share) / 65_535.0 * f64::from(size + 1) - 0.5;
        let [x0, x1, y0, y1] = [place(width, sides[0].0), place(width, sides[0].1), place(height, sides[1].0), place(height, sides[1].1)];
        let given = PixelBox { x0: x0.min(x1), y0: y0.min(y1), x1: x0.max(x1), y1: y0.max(y1), image: 0 };
        let Ok(found) = place_crop(&given, width, height, CropRule { margin, min_side }) else {
            // Within half a pixel of the image: refused only where nothing of it is inside.
            let empty = |start: f64, end: f64, size: u32| start >= end || end <= 0.0 || start >= f64::from(size);
            prop_assert!(empty(given.x0, given.x1, width) || empty(given.y0, given.y1, height));
            return Ok(());
        };
        let (right, bottom) = (found.left + found.width, found.top + found.height);
        prop_assert!(right <= width && bottom <= height);
        prop_assert!(found.width >= min_side.min(width) && found.height >= min_side.min(height));
        prop_assert!(f64::from(found.left) <= given.x0.max(0.0) && f64::from(found.top) <= given.y0.max(0.0));
        prop_assert!(f64::from(right) >= given.x1.min(width.into()) && f64::from(bottom) >= given.y1.min(height.into()));
    }

    #[test]
    fn merged_regions_cover_their_parts_and_no_longer_overlap(
        given in vec(regions(100, 80), 0..14),
        overlap in select(&[0.0, 0.1, 0.5, 1.0][..]),
    ) {
        let merged = merge_regions(&given, overlap);
        let mut parts: Vec<usize> = merged.iter().flat_map(|(_, parts)| parts.clone()).collect();
        parts.sort_unstable();
        prop_assert_eq!(parts, (0..given.len()).collect::<Vec<_>>());
        for (place, (region, parts)) in merged.iter().enumerate() {
            let whole = parts.iter().map(|&part| given[part]).reduce(|a, b| a.around(&b));
            prop_assert_eq!(whole, Some(*region));
            let area = |region: &Region| f64::from(region.width * region.height);
            for (other, _) in &merged[..place] {
                prop_assert!(region.shared_area(other) as f64 <= overlap * area(region).min(area(other)));
            }
        }
        prop_assert!(merged.windows(2).all(|pair| pair[0].1[0] < pair[1].1[0]), "the first part tells the place");
    }

    #[test]
    fn reading_order_has_every_region_once(given in vec(regions(100, 80), 0..14)) {
        let mut order = reading_order(&given);
        let top = given.iter().map(|region| region.top).min();
        let highest = |first: &Region| given.iter().any(|it| Some(it.top) == top && first.top < it.top + it.height);
        let begins_at_the_top = order.first().is_none_or(|&first| highest(&given[first]));
        prop_assert!(begins_at_the_top);
        order.sort_unstable();
        prop_assert_eq!(order, (0..given.len()).collect::<Vec<_>>());
    }

    #[test]
    fn smart_resize_gives_whole_blocks_within_the_budget((width, height) in sizes(6000), (patches, budget) in layouts()) {
        let (long, short) = (f64::from(width.max(height)), f64::from(width.min(height)));
        let Some((to_width, to_height)) = patches.smart_resize(width, height, budget) else {
            prop_assert!(long > 200.0 * short);
            return Ok(());
        };
        prop_assert!(long <= 200.0 * short);
        let factor = (patches.side * patches.merge) as u32;
        prop_assert!(to_width > 0 && to_height > 0 && to_width % factor == 0 && to_height % factor == 0);
        let area = u64::from(to_width) * u64::from(to_height);
        let round = |side: u32| (f64::from(side) / f64::from(factor)).round_ties_even() as u64 * u64::from(factor);
        let near = round(width) * round(height);
        // A side is a block at least, whatever the budget.
        let least = to_width == factor || to_height == factor;
        if near > budget.max_pixels {
            prop_assert!(area <= budget.max_pixels || least);
        } else if near < budget.min_pixels {
            prop_assert!(area >= budget.min_pixels);
        } else {
            prop_assert_eq!(area, near);
        }
        // Each side is off by a block at most, so the aspect is too.
        let (a, b) = (f64::from(to_width) * f64::from(height), f64::from(to_height) * f64::from(width));
        let block = f64::from(factor) * f64::from(width + height);
        prop_assert!(least || (a - b).abs() <= block, "{}x{}", to_width, to_height);
    }

    #[test]
    fn tiles_are_as_many_as_steps_write((width, height) in sizes(3000), tiling in tilings(), alone in any::<bool>()) {
        // A fault is a size that no processor of the family takes either.
        if let Ok(cut) = tiling.cut(width, height, alone) {
            prop_assert_eq!(count_written(&cut.steps, (width, height), tiling.frame) as usize, cut.frames);
            let (rows, columns) = cut.grid;
            // The whole image beside its tiles, unless it is one frame.
            prop_assert_eq!(cut.frames, rows * columns + 1);
        }
    }

    #[test]
    fn every_sample_of_every_frame_is_written(image in images(40), tiling in tilings(), alone in any::<bool>(), cuts in cuts()) {
        if let Ok(cut) = tiling.cut(image.width, image.height, alone) {
            let layout = Layout::Frames(tiling.frame as usize);
            let samples = write(&cut.steps, &image, layout, cut.frames, &cuts);
            prop_assert!(samples.iter().all(|sample| sample.is_finite()), "{:?}", cut);
        }
    }

    #[test]
    fn every_sample_of_every_patch_is_written(
        image in images(40),
        side in 1..9_usize,
        (merge, temporal) in (1..4_usize, 1..4_usize),
        min_pixels in option::of(1..5000_u64),
        cuts in cuts(),
    ) {
        let patches = Patches { side, merge, temporal };
        let budget = Budget { min_pixels: min_pixels.unwrap_or(1), max_pixels: 5000 };
        let size = (image.width, image.height);
        let to = patches.smart_resize(size.0, size.1, budget).expect("sides are near");
        let next = vec![Step::Write { first: 0 }];
        let steps = [Step::Resize { to, filter: Filter::Bicubic, next }];
        let (rows, columns) = patches.grid(to.0, to.1);
        let samples = write(&steps, &image, Layout::Patches(patches), rows * columns, &cuts);
        prop_assert!(samples.iter().all(|sample| sample.is_finite()));
    }

    #[test]
    fn turned_regions_are_the_same_part_of_the_turned_picture(
        (image, region) in images(40).prop_flat_map(|image| {
            let region = regions(image.width.min(image.height), image.width.min(image.height));
            (Just(image), region)
        }),
        value in 1..9_u32,
        cuts in cuts(),
    ) {
        let orientation = Orientation::from_value(value);
        let turn = |region: Region| {
            let mut upright = vec![0; region.width as usize * region.height as usize * BYTES];
            let mut top = 0;
            for rows in runs(image.rows(), region, &cuts) {
                orientation.turn_rows(rows, top, region.height as usize, &mut upright);
                top += rows.count();
            }
            upright
        };
        let stored_size = (image.width, image.height);
        let (width, height) = if orientation.swaps_sides() { (image.height, image.width) } else { stored_size };
        let whole = turn(Region::whole(image.width, image.height));
        let expected = Rows::new(&whole, width as usize, width as usize * BYTES, height as usize);
        let expected: Vec<u8> = expected.window(0, region).iter().flat_map(|rows| rows.iter().flatten()).copied().collect();
        prop_assert!(turn(orientation.store_region(region, (width, height))) == expected);
        prop_assert!(covers(&Region::whole(width, height), &region));
    }
}
