//! A picture to another size, bit for bit as torchvision or Pillow does it: its rows in from top to bottom, resized
//! rows out as soon as they are finished, with only the rows in memory that the vertical pass still needs.

use crate::convolve::{Horizontal, Kernel};
use crate::errors::ImageFault;
use crate::passes::{Across, Batch, Down, GROUP};
use crate::rgb::{Emit, Rows};
use crate::weights::{Filter, Parity, Weights};

/// Most rows handed on together: few enough to be in the cache still when they are taken.
const BATCH: usize = 8;

/// The resize of one picture.
#[derive(Debug)]
pub struct Resize {
    from: (usize, usize),
    seen: usize,
    passes: Passes,
    finished: Batch,
}

/// Each pass rounds to bytes, so their order shows; a pass along an axis that keeps its size is left out.
#[derive(Debug)]
enum Passes {
    Neither,
    Across(Across),
    Down(Down),
    AcrossDown(Across, Down),
    /// The batch between them gathers a group of rows.
    DownAcross(Down, Batch, Across),
}

impl Resize {
    /// # Panics
    /// When a side is zero.
    pub fn new(from: (u32, u32), to: (u32, u32), filter: Filter, parity: Parity) -> Result<Self, ImageFault> {
        Self::with_kernel(from, to, filter, parity, Kernel::detect())
    }

    pub(crate) fn with_kernel(
        from: (u32, u32),
        to: (u32, u32),
        filter: Filter,
        parity: Parity,
        kernel: Kernel,
    ) -> Result<Self, ImageFault> {
        assert!(from.0 > 0 && from.1 > 0 && to.0 > 0 && to.1 > 0);
        let across = || Across::new(Horizontal::new(Weights::new(from.0, to.0, filter, parity)?, kernel)?);
        let down = |width| Down::new(Weights::new(from.1, to.1, filter, parity)?, width, kernel);
        let passes = match (filter.changes(from.0, to.0), filter.changes(from.1, to.1)) {
            (false, false) => Passes::Neither,
            (true, false) => Passes::Across(across()?),
            (false, true) => Passes::Down(down(from.0)?),
            (true, true) if parity == Parity::Pillow && is_vertical_first(from, to) => {
                let across = across()?;
                let between = Batch::new(from.0, across.source_bytes(), GROUP)?;
                Passes::DownAcross(down(from.0)?, between, across)
            }
            (true, true) => Passes::AcrossDown(across()?, down(to.0)?),
        };
        let capacity = if matches!(passes, Passes::Neither) { 0 } else { BATCH };
        let finished = Batch::new(to.0, 0, capacity)?;
        Ok(Self { from: (from.0 as usize, from.1 as usize), seen: 0, passes, finished })
    }

    /// Takes the next rows of the picture, top to bottom, and hands on each output row as soon as it is finished, in
    /// order (vertical first: four together). After the last input row all output rows have been handed on.
    ///
    /// # Panics
    /// When the rows are not as wide as the picture, or more than it has left.
    pub fn push(&mut self, rows: Rows<'_>, emit: Emit<'_>) -> Result<(), ImageFault> {
        self.seen += rows.count();
        assert!(rows.width() == self.from.0 && self.seen <= self.from.1);
        let finished = &mut self.finished;
        match &mut self.passes {
            Passes::Neither => return emit(rows),
            Passes::Across(across) => {
                for first in (0..rows.count()).step_by(GROUP) {
                    across.push(rows, first, finished, emit)?;
                }
            }
            Passes::Down(down) => {
                for row in rows.iter() {
                    down.push(row);
                    down.finish_rows(finished, emit)?;
                }
            }
            Passes::AcrossDown(across, down) => {
                for first in (0..rows.count()).step_by(GROUP) {
                    down.push_across(rows, first, across);
                    down.finish_rows(finished, emit)?;
                }
            }
            Passes::DownAcross(down, between, across) => {
                for row in rows.iter() {
                    down.push(row);
                    down.finish_rows(between, &mut |rows| across.push(rows, 0, finished, emit))?;
                }
                if down.is_finished() {
                    between.hand_on(&mut |rows| across.push(rows, 0, finished, emit))?;
                }
            }
        }
        finished.hand_on(emit)
    }
}

/// Pillow's rule from 13.0 on.
fn is_vertical_first(from: (u32, u32), to: (u32, u32)) -> bool {
    let shrink = |from: u32, to: u32| i64::from(from) - i64::from(to);
    from.1 > to.1 && shrink(from.1, to.1) > 2 * shrink(from.0, to.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Region;
    use crate::rgb::Rgb;

    const FILTERS: [Filter; 5] =
        [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos, Filter::Box, Filter::Gaussian { sigma: 1.7 }];
    const PARITIES: [Parity; 3] = [Parity::Torchvision, Parity::Pillow, Parity::Pillow12];

    /// A stream of numbers that looks random (splitmix64).
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        fn below(&mut self, end: u32) -> u32 {
            (self.next() % u64::from(end)) as u32
        }

        fn pick<T: Copy>(&mut self, from: &[T]) -> T {
            from[self.below(from.len() as u32) as usize]
        }

        /// Mostly black and white, where sums overshoot, and some bytes between.
        fn noise(&mut self, width: u32, height: u32) -> Rgb {
            let byte = |random: u64| match random % 4 {
                0 => 0,
                1 => 255,
                _ => (random >> 8) as u8,
            };
            let pixels = (0..width * height * 3).map(|_| byte(self.next())).collect();
            Rgb { width, height, pixels }
        }
    }

    fn collect(resize: &mut Resize, pushes: &[Rows<'_>]) -> Vec<u8> {
        let mut pixels = Vec::new();
        for &rows in pushes {
            resize
                .push(rows, &mut |rows| {
                    pixels.extend(rows.iter().flatten());
                    Ok(())
                })
                .unwrap();
        }
        pixels
    }

    /// The whole picture at once, by the formula: each axis as a plain sum.
    fn resize_plainly(image: &Rgb, to: (u32, u32), filter: Filter, parity: Parity) -> Vec<u8> {
        let pass = |source: &[u8], width: usize, horizontal: bool, weights: &Weights| {
            let height = source.len() / width / 3;
            let (columns, rows) =
                if horizontal { (weights.spans().len(), height) } else { (width, weights.spans().len()) };
            let mut target = Vec::new();
            for (y, x, channel) in
                (0..rows).flat_map(|y| (0..columns).flat_map(move |x| (0..3).map(move |c| (y, x, c))))
            {
                let index = if horizontal { x } else { y };
                let sum: i64 = weights
                    .values(index)
                    .zip(weights.spans()[index].first..)
                    .map(|(weight, tap)| {
                        let (x, y) = if horizontal { (tap, y) } else { (x, tap) };
                        i64::from(weight) * i64::from(source[(y * width + x) * 3 + channel])
                    })
                    .sum();
                target.push(((sum + (1 << (weights.shift() - 1))) >> weights.shift()).clamp(0, 255) as u8);
            }
            target
        };
        let from = (image.width, image.height);
        let mut axes = [true, false];
        let vertical_first = from.1 > to.1
            && i64::from(from.1) - i64::from(to.1) > 2 * (i64::from(from.0) - i64::from(to.0))
            && parity == Parity::Pillow;
        if vertical_first {
            axes.reverse();
        }
        let (mut pixels, mut width) = (image.pixels.clone(), from.0);
        for horizontal in axes {
            let (input, output) = if horizontal { (from.0, to.0) } else { (from.1, to.1) };
            if filter.changes(input, output) {
                let weights = Weights::new(input, output, filter, parity).unwrap();
                pixels = pass(&pixels, width as usize, horizontal, &weights);
                width = if horizontal { to.0 } else { width };
            }
        }
        pixels
    }

    /// Pushes `region` of `image` in runs cut at random.
    fn resize_in_runs(
        image: &Rgb,
        region: Region,
        to: (u32, u32),
        filter: Filter,
        parity: Parity,
        kernel: Kernel,
        random: &mut Random,
    ) -> Vec<u8> {
        let from = (region.width, region.height);
        let mut resize = Resize::with_kernel(from, to, filter, parity, kernel).unwrap();
        let mut pushes = Vec::new();
        let mut top = 0;
        while top < image.height {
            let count = (1 + random.below(9)).min(image.height - top);
            let line = image.width as usize * 3;
            let bytes = &image.pixels[top as usize * line..(top + count) as usize * line];
            let run = Rows::new(bytes, image.width as usize, line, count as usize);
            pushes.extend(run.window(top, region));
            top += count;
        }
        collect(&mut resize, &pushes)
    }

    fn check(image: &Rgb, region: Region, to: (u32, u32), filter: Filter, parity: Parity, random: &mut Random) {
        let copy = Rgb {
            width: region.width,
            height: region.height,
            pixels: image
                .rows()
                .window(0, region)
                .map(|rows| rows.iter().flatten().copied().collect())
                .unwrap_or_default(),
        };
        let expected = resize_plainly(&copy, to, filter, parity);
        for kernel in Kernel::all() {
            let found = resize_in_runs(image, region, to, filter, parity, kernel, random);
            assert!(found == expected, "{region:?} to {to:?}, {filter:?}, {parity:?}, {kernel:?}");
        }
    }

    #[test]
    fn pixels_are_those_of_torchvision_and_pillow() {
        // FNV-1a of the bytes of torchvision 0.29 (v2.functional.resize, antialias, uint8) and of Pillow 13.0
        // (Image.resize; for Pillow12 the axes one by one, horizontal first).
        let table = [
            ((37, 61), (30, 17), Filter::Bilinear, Parity::Torchvision, 0x7705_2420_49fe_2d9a),
            ((37, 61), (30, 17), Filter::Bilinear, Parity::Pillow, 0x4370_61e6_9a79_1d32),
            ((37, 61), (30, 17), Filter::Bilinear, Parity::Pillow12, 0x4d78_b2fa_606d_e024),
            ((37, 61), (30, 17), Filter::Bicubic, Parity::Torchvision, 0xd424_8cfc_7e7e_b418),
            ((37, 61), (30, 17), Filter::Bicubic, Parity::Pillow, 0x29af_8c33_a1a2_e312),
            ((37, 61), (30, 17), Filter::Bicubic, Parity::Pillow12, 0x95f7_faa9_313d_cfee),
            ((37, 61), (30, 17), Filter::Lanczos, Parity::Torchvision, 0xa3df_ebf0_e757_bd46),
            ((37, 61), (30, 17), Filter::Lanczos, Parity::Pillow, 0x38d3_697b_c8b3_b29d),
            ((37, 61), (30, 17), Filter::Lanczos, Parity::Pillow12, 0xd8ca_8eef_c75b_9357),
            ((37, 61), (30, 17), Filter::Box, Parity::Pillow, 0x077a_edf9_7d50_faad),
            ((37, 61), (30, 17), Filter::Box, Parity::Pillow12, 0x154d_bf6c_9d50_f716),
            ((23, 11), (50, 29), Filter::Bilinear, Parity::Torchvision, 0xd67f_db2a_8ab0_9078),
            ((23, 11), (50, 29), Filter::Bilinear, Parity::Pillow, 0xf0a4_7eec_a02b_09ff),
            ((23, 11), (50, 29), Filter::Bilinear, Parity::Pillow12, 0xf0a4_7eec_a02b_09ff),
            ((23, 11), (50, 29), Filter::Bicubic, Parity::Torchvision, 0x7965_42f7_f898_3f58),
            ((23, 11), (50, 29), Filter::Bicubic, Parity::Pillow, 0x323a_f100_ed3d_fb15),
            ((23, 11), (50, 29), Filter::Bicubic, Parity::Pillow12, 0x323a_f100_ed3d_fb15),
            ((23, 11), (50, 29), Filter::Lanczos, Parity::Torchvision, 0x7fdd_bab0_f220_b9a5),
            ((23, 11), (50, 29), Filter::Lanczos, Parity::Pillow, 0x9290_4a57_80ab_b1f4),
            ((23, 11), (50, 29), Filter::Lanczos, Parity::Pillow12, 0x9290_4a57_80ab_b1f4),
            ((23, 11), (50, 29), Filter::Box, Parity::Pillow, 0x9aaa_ae50_268d_bac5),
            ((23, 11), (50, 29), Filter::Box, Parity::Pillow12, 0x9aaa_ae50_268d_bac5),
        ];
        for (from, to, filter, parity, expected) in table {
            let bytes = (0..from.0 * from.1 * 3).map(|i| (i * i * 7 + i * 31) as u8);
            let image = Rgb { width: from.0, height: from.1, pixels: bytes.collect() };
            let mut resize = Resize::new(from, to, filter, parity).unwrap();
            let hash =
                collect(&mut resize, &[image.rows()]).iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
                });
            assert_eq!(hash, expected, "{from:?} to {to:?}, {filter:?}, {parity:?}");
        }
    }

    #[test]
    fn every_kernel_gives_the_plain_sums_whatever_the_runs() {
        let mut random = Random(1);
        for _ in 0..400 {
            let (width, height) = (1 + random.below(90), 1 + random.below(90));
            let image = random.noise(width, height);
            let (left, top) = (random.below(width), random.below(height));
            let region = Region {
                left,
                top,
                width: 1 + random.below(width - left),
                height: 1 + random.below(height - top),
            };
            let to = (1 + random.below(120), 1 + random.below(120));
            let (filter, parity) = (random.pick(&FILTERS), random.pick(&PARITIES));
            check(&image, region, to, filter, parity, &mut random);
        }
    }

    #[test]
    fn thin_huge_and_unchanged_axes_come_out_right() {
        let mut random = Random(2);
        let sizes = [
            ((1, 1), (5, 7)),
            ((1, 400), (3, 2)),
            ((2000, 1), (3, 2)),
            ((1500, 9), (1, 1)),
            ((9, 1500), (9, 1)),
            ((30, 40), (30, 11)),
            ((30, 40), (11, 40)),
            ((30, 40), (30, 40)),
            ((3, 700), (90, 5)),
            ((700, 3), (5, 90)),
        ];
        for (from, to) in sizes {
            let image = random.noise(from.0, from.1);
            for filter in FILTERS {
                for parity in PARITIES {
                    check(&image, Region::whole(from.0, from.1), to, filter, parity, &mut random);
                }
            }
        }
    }

    #[test]
    fn row_is_handed_on_with_its_last_tap() {
        let image = Random(3).noise(40, 40);
        let mut resize = Resize::new((40, 40), (20, 20), Filter::Box, Parity::Torchvision).unwrap();
        let found: Vec<usize> =
            image.rows().iter().map(|row| collect(&mut resize, &[Rows::new(row, 40, 120, 1)]).len()).collect();
        let expected: Vec<usize> = (0..40).map(|row| if row % 2 == 1 { 60 } else { 0 }).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn fault_of_the_taker_comes_back() {
        let image = Random(4).noise(8, 8);
        let mut resize = Resize::new((8, 8), (4, 4), Filter::Bicubic, Parity::Pillow).unwrap();
        let found = resize.push(image.rows(), &mut |_| Err(ImageFault::Missing));
        assert_eq!(found, Err(ImageFault::Missing));
    }
}
