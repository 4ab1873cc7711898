//! Resampling weights of one axis, bit for bit those of torchvision (i16) or of Pillow (22 bits).

use std::f64::consts::PI;
use std::ops::Range;

use crate::errors::{ImageFault, allocate};

/// The kernel a pixel is spread by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Filter {
    Bilinear,
    /// a = -0.5
    Bicubic,
    Lanczos,
    /// The plain mean of the pixels covered.
    Box,
    /// Not in the references: blurs an image at its own size; `sigma` in pixels.
    Gaussian {
        sigma: f64,
    },
}

impl Filter {
    /// Whether an axis of `input` pixels is changed on its way to `output` pixels.
    #[must_use]
    pub fn changes(self, input: u32, output: u32) -> bool {
        let blurs = matches!(self, Self::Gaussian { sigma } if sigma > 0.0);
        input != output || blurs
    }

    /// How far the kernel reaches to each side, in pixels of the smaller of the two images.
    fn radius(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
            Self::Box => 0.5,
            // At least its own pixel: a window without weight would turn it black.
            Self::Gaussian { sigma } => (3.0 * sigma).max(0.5),
        }
    }

    /// The kernel at `x`. The order of the operations is the references': the last bit of a weight may decide a
    /// rounding.
    fn at(self, x: f64) -> f64 {
        match self {
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => {
                let x = x.abs();
                if x < 1.0 {
                    (1.5 * x - 2.5) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
                } else {
                    0.0
                }
            }
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Box if x > -0.5 && x <= 0.5 => 1.0,
            Self::Lanczos | Self::Box => 0.0,
            Self::Gaussian { sigma } if sigma > 0.0 => (-0.5 * (x / sigma) * (x / sigma)).exp(),
            Self::Gaussian { .. } => f64::from(u8::from(x.abs() <= 0.5)),
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * PI;
    x.sin() / x
}

/// Whose numbers are to be met, bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Parity {
    /// torchvision on uint8 CPU tensors: horizontal first, i16 weights.
    Torchvision,
    /// Pillow from 13.0 on: vertical first where that is cheaper by its rule.
    Pillow,
    /// Pillow up to 12.1: horizontal first.
    Pillow12,
}

/// Bits after the point of Pillow's weights, and the most of torchvision's.
const MAX_SHIFT: u32 = 22;
/// Bits of a weight in its low plane; the rest of it is in the high plane.
pub const LOW_BITS: u32 = 15;
/// Taps are padded to a multiple of this.
pub const CHUNK: usize = 4;

/// The input pixels that one output pixel is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The input pixel of the first stored weight.
    pub start: usize,
    /// The first input pixel whose weight counts; those stored before it are zero.
    pub first: usize,
    /// How many weights count, from `first` on; those stored after them are zero.
    pub taps: usize,
}

impl Span {
    /// The input pixel after the last one that counts.
    #[must_use]
    pub fn end(&self) -> usize {
        self.first + self.taps
    }
}

/// The weights of all output pixels of one axis, as integers with `shift` bits after the point.
///
/// For each output pixel `stored` weights stand in a row. A weight is one i16 (`high`, with `low` empty), or, where
/// it needs more bits, `(high << 15) + low` with `low` in `[0, 2^15)`: both planes then go through the same i16
/// multiplication, and the sum over the high plane is shifted at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weights {
    spans: Vec<Span>,
    stored: usize,
    high: Vec<i16>,
    low: Vec<i16>,
    shift: u32,
    input: usize,
}

impl Weights {
    pub fn new(input: u32, output: u32, filter: Filter, parity: Parity) -> Result<Self, ImageFault> {
        let (spans, exact, most) = weigh(input, output, filter)?;
        let stored = most.next_multiple_of(CHUNK);
        let shift = match parity {
            Parity::Torchvision => fit_i16(exact.iter().copied().fold(0.0, f64::max)),
            Parity::Pillow | Parity::Pillow12 => MAX_SHIFT,
        };
        let split = parity != Parity::Torchvision;
        let size = stored.checked_mul(spans.len()).ok_or(ImageFault::OutOfMemory(usize::MAX))?;
        let mut weights = Self {
            spans,
            stored,
            high: allocate(size)?,
            low: allocate(if split { size } else { 0 })?,
            shift,
            input: input as usize,
        };
        for (index, span) in weights.spans.iter_mut().enumerate() {
            // At the right edge the stored weights begin further left, so that they end with the input.
            span.start = span.first.min((input as usize).saturating_sub(stored));
            let at = index * stored + span.first - span.start;
            for (tap, &weight) in exact[index * most..][..span.taps].iter().enumerate() {
                let weight = round_half_away(weight * f64::from(1 << shift));
                if split {
                    weights.high[at + tap] = (weight >> LOW_BITS) as i16;
                    weights.low[at + tap] = (weight & ((1 << LOW_BITS) - 1)) as i16;
                } else {
                    weights.high[at + tap] = weight as i16;
                }
            }
        }
        Ok(weights)
    }

    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// How many weights stand in a row for each output pixel, a multiple of `CHUNK`; in each plane there are so many
    /// for each span.
    #[must_use]
    pub fn stored(&self) -> usize {
        self.stored
    }

    #[must_use]
    pub fn high(&self) -> &[i16] {
        &self.high
    }

    /// As long as the high plane, or empty.
    #[must_use]
    pub fn low(&self) -> &[i16] {
        &self.low
    }

    /// Bits after the point, at least one.
    #[must_use]
    pub fn shift(&self) -> u32 {
        self.shift
    }

    #[must_use]
    pub fn input(&self) -> usize {
        self.input
    }

    /// How many input pixels the stored weights lie on: more than the input has when that is tiny. No span's stored
    /// weights go further.
    #[must_use]
    pub fn reach(&self) -> usize {
        self.input.max(self.stored)
    }

    /// Where in the planes the weights of output pixel `index` stand that count.
    #[must_use]
    pub fn taps(&self, index: usize) -> Range<usize> {
        let span = self.spans[index];
        let at = index * self.stored + span.first - span.start;
        at..at + span.taps
    }

    /// The weights of output pixel `index` that count, whole.
    pub fn values(&self, index: usize) -> impl Iterator<Item = i32> {
        self.taps(index).map(|at| {
            let high = i32::from(self.high[at]);
            self.low.get(at).map_or(high, |&low| (high << LOW_BITS) + i32::from(low))
        })
    }

    /// Most weights of one output pixel that count.
    #[must_use]
    pub fn most_taps(&self) -> usize {
        self.spans.iter().map(|span| span.taps).max().unwrap_or(0)
    }
}

/// The f64 weights of each output pixel, `most` to each, with the spans they lie on.
fn weigh(input: u32, output: u32, filter: Filter) -> Result<(Vec<Span>, Vec<f64>, usize), ImageFault> {
    let scale = f64::from(input) / f64::from(output);
    let filter_scale = scale.max(1.0);
    let support = filter.radius() * filter_scale;
    let inverse = 1.0 / filter_scale;
    let centre = |index: usize| (index as f64 + 0.5) * scale;
    // The conversions saturate, and cut towards zero as C does.
    let mut spans: Vec<Span> = Vec::new();
    spans.try_reserve_exact(output as usize).map_err(|_| ImageFault::OutOfMemory(output as usize))?;
    spans.extend((0..output as usize).map(|index| {
        let first = (centre(index) - support + 0.5) as usize;
        let end = ((centre(index) + support + 0.5) as usize).min(input as usize);
        Span { start: first, first, taps: end.saturating_sub(first) }
    }));
    let most = spans.iter().map(|span| span.taps).max().unwrap_or(0).max(1);
    let size = most.checked_mul(spans.len()).ok_or(ImageFault::OutOfMemory(usize::MAX))?;
    let mut exact: Vec<f64> = allocate(size)?;
    for (index, (span, weights)) in spans.iter().zip(exact.chunks_exact_mut(most)).enumerate() {
        let weights = &mut weights[..span.taps];
        let mut total = 0.0;
        for (tap, weight) in weights.iter_mut().enumerate() {
            *weight = filter.at(((span.first + tap) as f64 - centre(index) + 0.5) * inverse);
            total += *weight;
        }
        if total != 0.0 {
            for weight in weights {
                *weight /= total;
            }
        }
    }
    Ok((spans, exact, most))
}

/// The most bits after the point with which `largest` is still an i16, by torch's count.
fn fit_i16(largest: f64) -> u32 {
    (0..MAX_SHIFT)
        .find(|shift| 0.5 + largest * f64::from(1 << (shift + 1)) >= f64::from(1 << 15))
        .unwrap_or(MAX_SHIFT)
}

fn round_half_away(value: f64) -> i32 {
    (if value < 0.0 { value - 0.5 } else { value + 0.5 }) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(weights: &Weights, index: usize) -> Vec<i32> {
        weights.values(index).collect()
    }

    #[test]
    fn weights_follow_the_formula() {
        // 4 pixels to 2 by the triangle: x of the taps is -1.5, -0.5, 0.5, 1.5 halves, cut at the edge.
        let table = [
            (Parity::Torchvision, 16, vec![28_087, 28_087, 9362]),
            (Parity::Pillow, 22, vec![1_797_559, 1_797_559, 599_186]),
        ];
        for (parity, shift, expected) in table {
            let weights = Weights::new(4, 2, Filter::Bilinear, parity).unwrap();
            assert_eq!(weights.shift, shift);
            assert_eq!(values(&weights, 0), expected);
            assert_eq!(weights.spans[0], Span { start: 0, first: 0, taps: 3 });
        }
    }

    #[test]
    fn negative_weights_come_back_whole_from_two_planes() {
        let weights = Weights::new(8, 16, Filter::Bicubic, Parity::Pillow).unwrap();
        let sum: i32 = values(&weights, 8).iter().sum();
        assert!(values(&weights, 8).iter().any(|&weight| weight < 0));
        assert!(weights.low.iter().all(|&low| low >= 0));
        assert!((sum - (1 << 22)).abs() <= 4, "{sum}");
    }

    #[test]
    fn stored_weights_end_with_the_input() {
        for (input, output) in [(4032, 1152), (9, 5), (100, 333), (4, 1), (16, 3)] {
            for filter in [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos, Filter::Box] {
                let weights = Weights::new(input, output, filter, Parity::Torchvision).unwrap();
                assert!(weights.reach() <= (input as usize).max(weights.stored), "{input} to {output}");
            }
        }
    }

    #[test]
    fn gaussian_without_sigma_changes_nothing() {
        for sigma in [0.0, -1.0, f64::NAN] {
            let filter = Filter::Gaussian { sigma };
            assert!(!filter.changes(5, 5));
            let weights = Weights::new(5, 5, filter, Parity::Torchvision).unwrap();
            assert!((0..5).all(|index| values(&weights, index) == [1 << weights.shift]), "{sigma}");
        }
    }
}
