//! What the fuzz targets share: choices read from the end of an input, and configs and boxes made of them.

use views::decode::Policy;
use views::geometry::{CropRule, PixelBox};
use views::header::Limits;
use views::looks::{Degrade, Highlight, Neutral};
use views::normalize::Scaling;
use views::patchify::{Budget, Patches};
use views::plan::{Config, CropConfig, Scheme};
use views::tile::{Family, Tiling};
use views::weights::{Filter, Parity};

/// Reads choices from the last bytes of an input, last one first; zeros when they are used up.
///
/// The bytes stay part of the file: decoders stop at its end mark, so that a seed is a plain image file and the
/// fuzzer may append its choices.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    #[must_use]
    pub fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    pub fn byte(&mut self) -> u8 {
        let Some((&last, rest)) = self.0.split_last() else { return 0 };
        self.0 = rest;
        last
    }

    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u32) -> u32 {
        let number = u32::from_le_bytes([self.byte(), self.byte(), 0, 0]);
        (u64::from(number) * u64::from(end) >> 16) as u32
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }
}

/// A config such as `imagine_opd.views` lets through, with small frames.
#[must_use]
pub fn choose_config(choices: &mut Choices<'_>, limits: Limits) -> Config {
    let filter = choices.pick(&[Filter::Bicubic, Filter::Bilinear, Filter::Lanczos]);
    let bits = choices.word();
    let bit = |place: u32| bits >> place & 1 == 1;
    let highlight = Highlight { width_share: f64::from(choices.byte()) / 255.0, colour: [255, 0, 9] };
    Config {
        scheme: choose_scheme(choices, filter),
        filter,
        parity: choices.pick(&[Parity::Torchvision, Parity::Pillow, Parity::Pillow12]),
        scaling: Scaling { mean: [0.5, 0.4, 0.3], std: [0.5, 0.2, 0.9], rescale_factor: 1.0 / 255.0 },
        policy: Policy { alpha_white: bit(0), exif: !bit(1) },
        crops: CropConfig {
            rule: CropRule {
                margin: choices.pick(&[0.0, 0.1, 3.0, 1e300]),
                min_side: choices.pick(&[1, 28, 1 << 31]),
            },
            merge_overlap: choices.pick(&[None, Some(0.0), Some(0.5), Some(1.0)]),
            reading_order: bit(2),
        },
        degrade: Degrade {
            scale: choices.pick(&[1.0, 0.5, 1e-4, 0.99]),
            blur_px: choices.pick(&[0.0, 0.3, 7.0, 1000.0]),
        },
        highlight: bit(3).then_some((highlight, bit(4))),
        neutral: choices.pick(&[None, Some(Neutral::Mean), Some(Neutral::Blur), Some(Neutral::LowResolution)]),
        teacher_global: !bit(5),
        student: !bit(6),
        scaled_decode: bit(7),
        sample_bytes: 4,
        limits,
        cache_bytes: 0,
    }
}

fn choose_scheme(choices: &mut Choices<'_>, filter: Filter) -> Scheme {
    let family = choices.byte() % 6;
    if family == 0 {
        let side = choices.pick(&[14, 16, 1, 5, 1024]);
        let mut budget = || {
            let max_pixels = u64::from(choices.word() >> choices.pick(&[12, 16, 1, 31])).max(1);
            Budget { min_pixels: max_pixels.min(choices.word().max(1).into()), max_pixels }
        };
        let (budget, crop_budget) = (budget(), budget());
        let patches = Patches { side, merge: choices.pick(&[2, 1, 3, 64]), temporal: choices.pick(&[2, 1, 3]) };
        return Scheme::Patches { patches, budget, crop_budget };
    }
    let frame = choices.pick(&[28, 16, 1, 37, 4096]);
    let pinpoints = (0..choices.byte() % 5).map(|_| {
        let mut side = || frame * (1 + u32::from(choices.byte()) % 9);
        (side(), side())
    });
    let pinpoints = pinpoints.collect();
    Scheme::Tiles(Tiling {
        family: [Family::Internvl, Family::LlavaNext, Family::LlavaOnevision, Family::Idefics3, Family::Gemma3]
            [usize::from(family) - 1],
        frame,
        filter,
        split: !choices.flag(),
        min_tiles: choices.pick(&[1, 2, 7, 1024]),
        max_tiles: choices.pick(&[12, 1, 40, 1024]),
        pinpoints,
        longest_edge_px: choices.pick(&[64, 200, 1, 1 << 30]),
        min_crop_px: choices.pick(&[16, 1, 256]),
        max_crops: choices.pick(&[4, 1, 1024]),
        min_ratio: choices.pick(&[1.2, 0.0, 1e300]),
        fill: [1, 2, 3],
    })
}

/// At most `most` boxes on `images` images, most of them on an image of `size` or near its edge, some hostile.
#[must_use]
pub fn choose_boxes(choices: &mut Choices<'_>, size: (u32, u32), images: usize, most: u8) -> Vec<PixelBox> {
    let count = choices.byte() % most.saturating_add(1);
    let side = |choices: &mut Choices<'_>, size: u32| match choices.byte() {
        0 => choices.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300, f64::from(size) + 1.0]),
        share => f64::from(share - 1) / 253.0 * f64::from(size) - f64::from(choices.byte() & 1) / 3.0,
    };
    (0..count)
        .map(|_| {
            let (a, b) = (side(choices, size.0), side(choices, size.0));
            let (c, d) = (side(choices, size.1), side(choices, size.1));
            let image = i64::from(choices.byte()) % (images as i64 + 1) - i64::from(choices.byte() == 255);
            let image = if images == 1 && image == 1 { 0 } else { image };
            PixelBox { x0: a.min(b), y0: c.min(d), x1: a.max(b), y1: c.max(d), image }
        })
        .collect()
}
