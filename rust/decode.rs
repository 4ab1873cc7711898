//! Encoded bytes to the upright RGB rows of a region, each as soon as it is decoded; a damaged file is refused.

use crate::errors::{ImageFault, allocate};
use crate::geometry::Region;
use crate::header::{Format, Header};
use crate::rgb::{BYTES, Emit, Rgb, Rows};
use crate::{gif, jpeg, png, webp};

/// What is done with that which is no colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Whether transparent pixels are laid on white, as Pillow does it. Otherwise their colour counts, whatever it is.
    pub alpha_white: bool,
    /// Whether the picture is turned as its EXIF orientation says.
    pub exif: bool,
}

impl Default for Policy {
    /// What transformers does with the path of an image.
    fn default() -> Self {
        Self { alpha_white: false, exif: true }
    }
}

/// The pixels that are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Inside the upright picture (the stored one when the policy ignores EXIF), scaled by the denominator.
    pub region: Region,
    /// 1, or for files that `can_scale` also 2, 4 or 8: the picture is decoded at 1/`denominator`, sides rounded up.
    pub denominator: u32,
}

/// Whether a file can be decoded at less than its size.
#[must_use]
pub fn can_scale(header: &Header) -> bool {
    header.format == Format::Jpeg
}

/// (width, height) of the upright picture decoded at 1/`denominator`.
#[must_use]
pub fn scaled_size(header: &Header, denominator: u32) -> (u32, u32) {
    let (width, height) = header.size();
    (width.div_ceil(denominator), height.div_ceil(denominator))
}

/// Decodes the whole picture of `bytes`, whose header was read before.
pub fn decode(bytes: &[u8], header: &Header, policy: Policy) -> Result<Rgb, ImageFault> {
    let (width, height) = if policy.exif { header.size() } else { header.without_orientation().size() };
    let mut pixels = allocate(width as usize * height as usize * BYTES)?;
    let mut at = 0;
    let wanted = Wanted { region: Region::whole(width, height), denominator: 1 };
    decode_rows(bytes, header, policy, wanted, &mut |rows| {
        for row in rows.iter() {
            pixels[at..at + row.len()].copy_from_slice(row);
            at += row.len();
        }
        Ok(())
    })?;
    Ok(Rgb { width, height, pixels })
}

/// Hands over exactly the rows of `wanted.region`, from top to bottom, as runs of rows of its width.
///
/// Damage that lies behind the region may go unseen.
///
/// # Panics
/// When the region is not inside the picture, or the denominator is none of those that the file can be scaled by.
pub fn decode_rows(
    bytes: &[u8],
    header: &Header,
    policy: Policy,
    wanted: Wanted,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let Wanted { region, denominator } = wanted;
    assert!(
        denominator == 1 || (can_scale(header) && [2, 4, 8].contains(&denominator)),
        "scaled by 1/{denominator}"
    );
    let header = if policy.exif { *header } else { header.without_orientation() };
    let (width, height) = scaled_size(&header, denominator);
    let is_inside = |start: u32, len: u32, side: u32| len > 0 && start < side && len <= side - start;
    assert!(
        is_inside(region.left, region.width, width) && is_inside(region.top, region.height, height),
        "{region:?} of {width}x{height} pixels"
    );
    let orientation = header.orientation;
    if orientation.is_upright() {
        return decode_stored(bytes, &header, policy, wanted, emit);
    }
    let region = orientation.store_region(region, (width, height));
    let mut turned = allocate(region.width as usize * region.height as usize * BYTES)?;
    let mut top = 0;
    decode_stored(bytes, &header, policy, Wanted { region, denominator }, &mut |rows| {
        orientation.turn_rows(rows, top, region.height as usize, &mut turned);
        top += rows.count();
        Ok(())
    })?;
    let width = wanted.region.width as usize;
    emit(Rows::new(&turned, width, width * BYTES, wanted.region.height as usize))
}

/// The same in the frame of the stored picture.
fn decode_stored(
    bytes: &[u8],
    header: &Header,
    policy: Policy,
    Wanted { region, denominator }: Wanted,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    match header.format {
        Format::Jpeg => jpeg::decode_rows(bytes, header, denominator, region, emit),
        Format::Png => png::decode_rows(bytes, header, policy.alpha_white, region, emit),
        Format::Webp => webp::decode_rows(bytes, header, policy.alpha_white, region, emit),
        Format::Gif => gif::decode_rows(bytes, header, policy.alpha_white, region, emit),
    }
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
