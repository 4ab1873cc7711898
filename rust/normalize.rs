//! Bytes to the numbers a model takes: per channel, each of the 256 bytes has its value, computed once.

#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "AVX2 loads and stores"))]

use std::mem::MaybeUninit;

use crate::rgb::{BYTES, Rows};
use crate::weights::Parity;

/// Outputs from this size on are not read from a cache.
const PAST_CACHE_FROM_BYTES: usize = 4 << 20;

/// A number of the output.
pub trait Sample: Copy + Default + Send + Sync + bytemuck::Pod {
    /// Whether samples are the bytes as they are: the receiver normalises, and repeats them in time.
    const RAW: bool;
    fn from_value(value: f32, byte: u8) -> Self;
}

impl Sample for f32 {
    const RAW: bool = false;
    fn from_value(value: f32, _: u8) -> Self {
        value
    }
}

/// bfloat16, by its bits.
impl Sample for u16 {
    const RAW: bool = false;
    fn from_value(value: f32, _: u8) -> Self {
        // To the nearest, ties to even, as torch rounds; no value here is a NaN.
        let bits = value.to_bits();
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as Self
    }
}

impl Sample for u8 {
    const RAW: bool = true;
    fn from_value(_: f32, byte: u8) -> Self {
        byte
    }
}

/// How bytes are scaled and normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    pub mean: [f64; 3],
    pub std: [f64; 3],
    pub rescale_factor: f64,
}

/// Written samples, to be written again.
#[cfg(test)]
pub fn unwritten<T: Sample>(samples: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: the same layout, and a test only ever writes samples there.
    unsafe { std::slice::from_raw_parts_mut(samples.as_mut_ptr().cast(), samples.len()) }
}

#[derive(Debug, Clone)]
pub struct Normalizer<T> {
    tables: Box<[[T; 256]; 3]>,
    /// Mean and deviation per channel, where `(byte - mean) / deviation` in f32 is the table, bit for bit.
    affine: Option<[(f32, f32); 3]>,
    /// Whether samples go past the caches: of a large output none is there any more when it is read.
    past_cache: bool,
}

impl<T> Normalizer<T> {
    /// What was written is there for other threads to read; called before they may.
    pub fn settle(&self) {
        #[cfg(target_arch = "x86_64")]
        if self.past_cache {
            // SAFETY: every x86-64 has it, and it touches no memory of ours.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }
}

impl<T: Sample> Normalizer<T> {
    #[must_use]
    pub fn new(scaling: Scaling, parity: Parity) -> Self {
        let mut tables = Box::new([[T::default(); 256]; 3]);
        let mut affine = [(0.0, 1.0); 3];
        for (channel, table) in tables.iter_mut().enumerate() {
            let (mean, std) = (scaling.mean[channel] as f32, scaling.std[channel] as f32);
            // torchvision's backend scales mean and deviation instead of the pixels.
            let unit = (1.0 / scaling.rescale_factor) as f32;
            affine[channel] = (mean * unit, std * unit);
            for (byte, value) in (0..=255_u8).zip(table) {
                let normal = match parity {
                    Parity::Torchvision => (f32::from(byte) - mean * unit) / (std * unit),
                    Parity::Pillow | Parity::Pillow12 => {
                        ((f64::from(byte) * scaling.rescale_factor) as f32 - mean) / std
                    }
                };
                *value = T::from_value(normal, byte);
            }
        }
        Self { tables, affine: (parity == Parity::Torchvision).then_some(affine), past_cache: false }
    }

    /// For an output of so many bytes.
    #[must_use]
    pub fn for_output(self, bytes: usize) -> Self {
        Self { past_cache: bytes >= PAST_CACHE_FROM_BYTES, ..self }
    }

    /// The pixels of a block into one slice a channel, `[copies, rows, columns]`: as many copies as there is room for.
    ///
    /// # Panics
    /// When the slices differ in length, or have no room for whole blocks.
    pub fn spread(&self, block: Rows<'_>, channels: [&mut [MaybeUninit<T>]; 3]) {
        let area = block.count() * block.width();
        let copies = channels[0].len() / area;
        assert!(channels.iter().all(|channel| channel.len() == copies * area));
        #[cfg(target_arch = "x86_64")]
        if let Some(affine) = &self.affine
            && size_of::<T>() == size_of::<f32>()
            && std::arch::is_x86_feature_detected!("avx2")
        {
            let targets = channels.map(|channel| channel.as_mut_ptr().cast());
            // SAFETY: the processor has AVX2, as was asked; the lengths are as asserted, and `T` is an f32: of all
            // samples it alone has its size.
            unsafe { spread_avx2(block, targets, copies, affine, self.past_cache) };
            return;
        }
        for ((channel, table), offset) in channels.into_iter().zip(&*self.tables).zip(0..) {
            let (first, others) = channel.split_at_mut(area);
            for (row, target) in block.iter().zip(first.chunks_exact_mut(block.width())) {
                for (sample, pixel) in target.iter_mut().zip(row.as_chunks::<BYTES>().0) {
                    sample.write(table[usize::from(pixel[offset])]);
                }
            }
            for copy in others.chunks_exact_mut(area) {
                copy.copy_from_slice(first);
            }
        }
    }
}

/// # Safety
/// Needs AVX2, and at each target room for `copies` times as many values as the block has pixels.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn spread_avx2(
    block: Rows<'_>,
    targets: [*mut f32; 3],
    copies: usize,
    affine: &[(f32, f32); 3],
    past_cache: bool,
) {
    use std::arch::x86_64::{
        _mm_loadu_si128, _mm_or_si128, _mm_setr_epi8, _mm_shuffle_epi8, _mm256_cmpgt_epi32, _mm256_cvtepi32_ps,
        _mm256_cvtepu8_epi32, _mm256_div_ps, _mm256_maskstore_ps, _mm256_set1_epi32, _mm256_set1_ps,
        _mm256_setr_epi32, _mm256_storeu_ps, _mm256_stream_ps, _mm256_sub_ps,
    };
    const NO: i8 = -1;
    // Where the bytes of a channel's eight pixels are in the first 16 bytes, and in the 16 that begin at byte 8.
    let from_low = [
        _mm_setr_epi8(0, 3, 6, 9, 12, 15, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO),
        _mm_setr_epi8(1, 4, 7, 10, 13, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO),
        _mm_setr_epi8(2, 5, 8, 11, 14, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO),
    ];
    let from_high = [
        _mm_setr_epi8(NO, NO, NO, NO, NO, NO, 10, 13, NO, NO, NO, NO, NO, NO, NO, NO),
        _mm_setr_epi8(NO, NO, NO, NO, NO, 8, 11, 14, NO, NO, NO, NO, NO, NO, NO, NO),
        _mm_setr_epi8(NO, NO, NO, NO, NO, 9, 12, 15, NO, NO, NO, NO, NO, NO, NO, NO),
    ];
    let means = affine.map(|(mean, _)| _mm256_set1_ps(mean));
    let deviations = affine.map(|(_, deviation)| _mm256_set1_ps(deviation));
    let (width, area) = (block.width(), block.count() * block.width());
    // Whole lines only: half a line written past the cache costs more than one written into it.
    let past_cache = past_cache && width % 16 == 0 && targets.iter().all(|target| target.addr() % 64 == 0);
    for y in 0..block.count() {
        let row = &block.bytes()[y * block.stride()..];
        for first in (0..width).step_by(8) {
            let bytes = &row[first * BYTES..];
            let mut last = [0_u8; 24];
            let at = if bytes.len() >= last.len() {
                bytes.as_ptr()
            } else {
                last[..bytes.len()].copy_from_slice(bytes);
                last.as_ptr()
            };
            // SAFETY: 24 bytes are read, of the rows where they have them and otherwise of a copy of their end.
            let (low, high) = unsafe { (_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(8).cast())) };
            let missing = _mm256_set1_epi32((width - first).min(8) as i32);
            let mask = _mm256_cmpgt_epi32(missing, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            for channel in 0..3 {
                let picked = _mm_or_si128(
                    _mm_shuffle_epi8(low, from_low[channel]),
                    _mm_shuffle_epi8(high, from_high[channel]),
                );
                let values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(picked));
                // Division, as the reference divides: a product with the inverse differs in the last bit.
                let values = _mm256_div_ps(_mm256_sub_ps(values, means[channel]), deviations[channel]);
                for copy in 0..copies {
                    // SAFETY: inside of the copy's row; of its last values only as many are written as there is
                    // room for.
                    unsafe {
                        let target = targets[channel].add(copy * area + y * width + first);
                        if past_cache {
                            _mm256_stream_ps(target, values);
                        } else if width - first >= 8 {
                            _mm256_storeu_ps(target, values);
                        } else {
                            _mm256_maskstore_ps(target, mask, values);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIP: Scaling = Scaling {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
        rescale_factor: 1.0 / 255.0,
    };

    #[test]
    fn every_byte_has_the_value_of_its_table_whatever_the_block() {
        for parity in [Parity::Torchvision, Parity::Pillow] {
            let normalizer = Normalizer::<f32>::new(CLIP, parity);
            for (count, copies, gap) in (1..40).map(|count| (count, 1 + count % 3, count % 5)).chain([(256, 1, 0)])
            {
                let (stride, area) = (count * BYTES + gap, 2 * count);
                let bytes: Vec<u8> = (0..stride + count * BYTES).map(|i| (i * 7 % 256) as u8).collect();
                let mut out = vec![f32::NAN; 3 * copies * area];
                let (red, rest) = out.split_at_mut(copies * area);
                let (green, blue) = rest.split_at_mut(copies * area);
                normalizer.spread(Rows::new(&bytes, count, stride, 2), [red, green, blue].map(unwritten));
                for (at, found) in out.iter().enumerate() {
                    let (channel, pixel) = (at / (copies * area), at % area);
                    let byte = bytes[pixel / count * stride + pixel % count * BYTES + channel];
                    let expected = normalizer.tables[channel][usize::from(byte)];
                    assert_eq!(found.to_bits(), expected.to_bits(), "{count} {copies} {gap}: {at}");
                }
            }
        }
    }

    #[test]
    fn halves_round_to_even_in_bfloat16() {
        for (value, expected) in [(1.0, 0x3f80), (1.003_906_3, 0x3f80), (1.011_718_8, 0x3f82), (-2.5, 0xc020)] {
            assert_eq!(u16::from_value(value, 0), expected, "{value}");
        }
    }

    #[test]
    fn raw_samples_are_the_bytes() {
        let normalizer = Normalizer::<u8>::new(CLIP, Parity::Torchvision);
        let bytes = [1, 2, 3, 4, 5, 6];
        let (mut red, mut green, mut blue) = ([0; 2], [0; 2], [0; 2]);
        normalizer.spread(Rows::new(&bytes, 2, 6, 1), [&mut red[..], &mut green, &mut blue].map(unwritten));
        assert_eq!((red, green, blue), ([1, 4], [2, 5], [3, 6]));
    }
}
