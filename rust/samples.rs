//! What the decoders of all formats share: how the samples of a stored pixel become RGB, and whose pixels they are.

use crate::errors::ImageFault;
use crate::geometry::Region;
use crate::rgb::{BYTES, Emit, Rows};

/// The header was read from the same file moments before: another size means that it changed, or lies.
pub fn check_same_size(promised: (u32, u32), found: (u32, u32)) -> Result<(), ImageFault> {
    if promised == found {
        return Ok(());
    }
    let ((old_width, old_height), (width, height)) = (promised, found);
    Err(ImageFault::Undecodable(format!("{old_width}x{old_height} by its header, then {width}x{height}")))
}

/// How the samples of a pixel become RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Samples {
    Rgb,
    Rgba,
    Grey,
    GreyAlpha,
}

impl Samples {
    /// Bytes of one pixel.
    #[must_use]
    pub fn count(self) -> usize {
        match self {
            Self::Grey => 1,
            Self::GreyAlpha => 2,
            Self::Rgb => 3,
            Self::Rgba => 4,
        }
    }

    /// Fills `rgb` from the pixels of `source`, laid on white or with their alpha dropped.
    pub fn write_rgb(self, source: &[u8], alpha_white: bool, rgb: &mut [u8]) {
        let pixels = rgb.chunks_exact_mut(BYTES).zip(source.chunks_exact(self.count()));
        match (self, alpha_white) {
            (Self::Rgb, _) => rgb.copy_from_slice(source),
            (Self::Rgba, false) => pixels.for_each(|(target, p)| target.copy_from_slice(&p[..BYTES])),
            (Self::Grey, _) | (Self::GreyAlpha, false) => pixels.for_each(|(target, p)| target.fill(p[0])),
            (Self::Rgba, true) => pixels.for_each(|(target, p)| {
                target.copy_from_slice(&[
                    lay_on_white(p[0], p[3]),
                    lay_on_white(p[1], p[3]),
                    lay_on_white(p[2], p[3]),
                ]);
            }),
            (Self::GreyAlpha, true) => pixels.for_each(|(target, p)| target.fill(lay_on_white(p[0], p[1]))),
        }
    }
}

/// One sample over white, rounded as `PIL.Image.alpha_composite` rounds it.
fn lay_on_white(sample: u8, alpha: u8) -> u8 {
    let (sample, alpha) = (u32::from(sample), u32::from(alpha));
    // Pillow's weights have 7 bits more than a byte; the division by 255 is the usual one without a division.
    let sum = ((sample * alpha + 255 * (255 - alpha)) << 7) + (0x80 << 7);
    ((((sum >> 8) + sum) >> 8) >> 7) as u8
}

/// The part of a picture that is decoded whole.
pub fn emit_region(pixels: &[u8], width: u32, region: Region, emit: Emit<'_>) -> Result<(), ImageFault> {
    let stride = width as usize * BYTES;
    let at = region.top as usize * stride + region.left as usize * BYTES;
    emit(Rows::new(&pixels[at..], region.width as usize, stride, region.height as usize))
}
