//! Why a view could not be made: what was found and the fix in one sentence, and a short code for counting.

use thiserror::Error;

/// Longest side of an image, as libpng allows it: the weights of a resize grow with it, whatever the area is.
pub const MAX_SIDE_PX: u32 = 1_000_000;

/// What is wrong with an image; the sentence goes on after the image's name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ImageFault {
    #[error("does not exist; check the path")]
    Missing,
    #[error("cannot be read ({0}); expected a readable image file")]
    Unreadable(String),
    #[error("has {found} bytes, over max_image_bytes={limit}; shrink the file or raise the limit")]
    TooManyBytes { found: u64, limit: u64 },
    #[error("is {width}x{height} pixels, over max_image_pixels={limit}; shrink the image or raise the limit")]
    TooManyPixels { width: u32, height: u32, limit: u64 },
    #[error("is {width}x{height} pixels, a side over {MAX_SIDE_PX}; cut the image up")]
    TooLong { width: u32, height: u32 },
    #[error(
        "does not fit in memory ({0} bytes wanted); give fewer rows at a time, or lower max_pixels or max_image_pixels"
    )]
    OutOfMemory(usize),
    #[error("is {width}x{height} pixels, sides more than 200 to 1; crop or pad it")]
    Aspect { width: u32, height: u32 },
    #[error("{0}")]
    Untileable(String),
    #[error("was not read: the batch was cancelled")]
    Cancelled,
    #[error("is truncated ({0}); fetch the file again")]
    Truncated(String),
    #[error("cannot be decoded ({0}); expected an intact JPEG, PNG, WebP or GIF")]
    Undecodable(String),
}

impl ImageFault {
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unreadable(_) => "unreadable",
            Self::TooManyBytes { .. }
            | Self::TooManyPixels { .. }
            | Self::TooLong { .. }
            | Self::OutOfMemory(_) => "too_large",
            Self::Aspect { .. } | Self::Untileable(_) => "aspect",
            Self::Cancelled => "cancelled",
            Self::Truncated(_) => "truncated",
            Self::Undecodable(_) => "undecodable",
        }
    }
}

/// What is wrong with a box; the sentence goes on after the box's numbers.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BoxFault {
    #[error("has a side that is not a finite number; expected four pixel values")]
    NotFinite,
    #[error("is reversed; expected x0 < x1 and y0 < y1")]
    Reversed,
    #[error("has no {side}; expected x0 < x1 and y0 < y1")]
    Empty { side: &'static str },
    #[error(
        "lies outside its image of {width}x{height} pixels; expected 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, in pixels after EXIF"
    )]
    Outside { width: u32, height: u32 },
    #[error("lies on image {image}, but the row has {count} (counted from 0); fix the box's image")]
    NoSuchImage { image: i64, count: usize },
    #[error(
        "gives a crop of {width}x{height} pixels, sides more than 200 to 1; widen the box or raise min_crop_px"
    )]
    Aspect { width: u32, height: u32 },
    #[error("gives a crop that {0}")]
    Untileable(String),
}

impl BoxFault {
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFinite => "box_not_finite",
            Self::Reversed => "box_reversed",
            Self::Empty { .. } => "box_empty",
            Self::Outside { .. } => "box_outside",
            Self::NoSuchImage { .. } => "box_image",
            Self::Aspect { .. } | Self::Untileable(_) => "aspect",
        }
    }
}

/// Most boxes of one row.
pub const MAX_BOXES: usize = 256;
/// Most bytes that the patches of one row's views may take, student's and teacher's together.
pub const MAX_ROW_BYTES: usize = 2 << 30;

/// Why one row has no views.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ViewError {
    #[error("the row has no image; give it `image` or `images`")]
    NoImage,
    #[error("the row has {found} boxes, over the {MAX_BOXES} of one row; give fewer boxes")]
    TooManyBoxes { found: usize },
    #[error(
        "the views of {images} images and {boxes} boxes have {pixels} pixels, {bytes} bytes of patches, over the {MAX_ROW_BYTES} of one row; give fewer boxes or lower max_pixels and crop_min_pixels"
    )]
    TooManyViews { images: usize, boxes: usize, pixels: u64, bytes: usize },
    #[error("image {name} {fault}")]
    Image { name: String, fault: ImageFault },
    #[error("box {name} {fault}")]
    Box { name: String, fault: BoxFault },
}

impl ViewError {
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoImage => "no_image",
            Self::TooManyBoxes { .. } | Self::TooManyViews { .. } => "too_large",
            Self::Image { fault, .. } => fault.code(),
            Self::Box { fault, .. } => fault.code(),
        }
    }
}

/// Runs `work`, turning a panic (a decoder's bug met by a hostile file) into a fault.
pub fn catch_panic<T>(work: impl FnOnce() -> Result<T, ImageFault>) -> Result<T, ImageFault> {
    // Everything `work` was changing is dropped with it, so no broken value is seen afterwards.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(ImageFault::Undecodable("the decoder panicked".into())))
}

/// A zeroed buffer, or a fault where the plain `vec!` would end the process.
pub fn allocate<T: bytemuck::Zeroable>(len: usize) -> Result<Vec<T>, ImageFault> {
    // Untouched zero pages from the system, which `try_reserve` and `resize` would write once for nothing.
    bytemuck::allocation::try_zeroed_vec(len)
        .map_err(|()| ImageFault::OutOfMemory(len.saturating_mul(size_of::<T>())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_becomes_a_fault() {
        let found: Result<(), _> = catch_panic(|| panic!("bad table"));
        assert_eq!(found.unwrap_err().code(), "undecodable");
    }

    #[test]
    fn impossible_allocation_becomes_a_fault() {
        assert_eq!(allocate::<f32>(usize::MAX / 8).unwrap_err().code(), "too_large");
    }

    #[test]
    fn sentence_names_what_was_found() {
        let error = ViewError::Box { name: "(10, 4, 9, 20)".into(), fault: BoxFault::Reversed };
        assert_eq!(error.to_string(), "box (10, 4, 9, 20) is reversed; expected x0 < x1 and y0 < y1");
    }
}
