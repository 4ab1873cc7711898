//! A region of an image to another size, bit for bit as torchvision resizes uint8 on the CPU.

use std::borrow::Cow;

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ImageView, ResizeAlg, ResizeOptions, Resizer};

use crate::errors::{ImageFault, allocate};
use crate::geometry::Region;
use crate::rgb::Rgb;

type PixelRows<'a> = TypedImageRef<'a, U8x3>;

/// Bicubic (a = -0.5, antialiased) resize of `region` to `width` x `height`; the filter stops at the region's
/// edge, as after a crop.
///
/// Two calls, horizontal then vertical, each rounding to u8: torchvision's order. One call of the library goes
/// vertical first and differs in a fifth of the samples.
pub fn resize_region(image: &Rgb, region: Region, width: u32, height: u32) -> Result<Cow<'_, [u8]>, ImageFault> {
    let whole = Region::whole(image.width, image.height);
    if region == whole && (width, height) == (image.width, image.height) {
        return Ok(Cow::Borrowed(&image.pixels));
    }
    if (width, height) == (region.width, region.height) {
        return copy_region(image, region).map(Cow::Owned);
    }
    let source = PixelRows::from_buffer(image.width, image.height, &image.pixels).map_err(name_fault)?;
    let Region { left, top, width: from_width, height: from_height } = region;
    let view = TypedCroppedImage::from_ref(&source, left, top, from_width, from_height).map_err(name_fault)?;
    if width == from_width {
        return resize_pass(&view, width, height).map(Cow::Owned);
    }
    let wide = resize_pass(&view, width, from_height)?;
    if height == from_height {
        return Ok(Cow::Owned(wide));
    }
    let wide = PixelRows::from_buffer(width, from_height, &wide).map_err(name_fault)?;
    resize_pass(&wide, width, height).map(Cow::Owned)
}

/// One pass along one axis. Typed, so that the library is compiled for this one kind of pixel only.
fn resize_pass(source: &impl ImageView<Pixel = U8x3>, width: u32, height: u32) -> Result<Vec<u8>, ImageFault> {
    let mut pixels = allocate(width as usize * height as usize * 3)?;
    let mut target = TypedImage::<U8x3>::from_buffer(width, height, &mut pixels).map_err(name_fault)?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    Resizer::new().resize_typed(source, &mut target, &options).map_err(name_fault)?;
    Ok(pixels)
}

fn copy_region(image: &Rgb, region: Region) -> Result<Vec<u8>, ImageFault> {
    let line = region.width as usize * 3;
    let mut pixels = allocate(line * region.height as usize)?;
    for (y, target) in pixels.chunks_exact_mut(line).enumerate() {
        let at = ((region.top as usize + y) * image.width as usize + region.left as usize) * 3;
        target.copy_from_slice(&image.pixels[at..at + line]);
    }
    Ok(pixels)
}

fn name_fault(error: impl std::fmt::Display) -> ImageFault {
    ImageFault::Undecodable(format!("resize: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: u32, height: u32) -> Rgb {
        let pixels = (0..width * height * 3).map(|i| (i * 37 % 251) as u8).collect();
        Rgb { width, height, pixels }
    }

    #[test]
    fn same_size_is_the_same_pixels() {
        let image = gradient(7, 5);
        let same = resize_region(&image, Region::whole(7, 5), 7, 5).unwrap();
        assert!(matches!(same, Cow::Borrowed(pixels) if pixels == image.pixels));
    }

    #[test]
    fn region_equals_the_resized_copy_of_it() {
        let image = gradient(40, 30);
        let region = Region { left: 3, top: 5, width: 21, height: 17 };
        let copy = Rgb { width: 21, height: 17, pixels: copy_region(&image, region).unwrap() };
        for (width, height) in [(21, 17), (32, 17), (21, 64), (8, 9), (64, 32)] {
            let expected = resize_region(&copy, Region::whole(21, 17), width, height).unwrap();
            assert_eq!(resize_region(&image, region, width, height).unwrap(), expected, "{width}x{height}");
        }
    }
}
