//! How a view may look other than its pixels are: degraded for the student, neutral for a contrast, outlined.

use crate::geometry::Region;
use crate::steps::Step;
use crate::weights::Filter;

/// What takes the place of evidence that is to say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neutral {
    /// The mean colour of the crop.
    Mean,
    /// The crop under a Gaussian blur.
    Blur,
    /// The crop at an eighth of its size.
    LowResolution,
}

/// How far a neutral blur reaches (its deviation), as a share of the crop's longer side.
const BLUR_SHARE: f64 = 1.0 / 32.0;
/// A wider blur than this is done on a smaller picture: as smooth, and far cheaper.
const MAX_SIGMA_PX: f64 = 4.0;
const LOW_RESOLUTION: f64 = 1.0 / 8.0;

/// Borders of the evidence, drawn on a global image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Highlight {
    /// Of the image's longer side.
    pub width_share: f64,
    pub colour: [u8; 3],
}

/// The student's image, made worse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Degrade {
    /// Sides are shrunk to this share and blown up again.
    pub scale: f64,
    /// Deviation of a Gaussian blur, in pixels of the original image.
    pub blur_px: f64,
}

impl Degrade {
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.scale >= 1.0 && self.blur_px <= 0.0
    }

    /// The steps of an image of this size, seen through the degradation.
    #[must_use]
    pub fn wrap(&self, steps: Vec<Step>, size: (u32, u32), filter: Filter) -> Vec<Step> {
        let steps = if self.scale < 1.0 { shrink(steps, size, self.scale, filter) } else { steps };
        if self.blur_px > 0.0 { blur(steps, size, self.blur_px) } else { steps }
    }
}

impl Neutral {
    /// The steps of a crop of this size, for what is left of it.
    #[must_use]
    pub fn wrap(self, steps: Vec<Step>, size: (u32, u32), filter: Filter) -> Vec<Step> {
        match self {
            Self::Mean => detour(steps, size, (1, 1), Filter::Box),
            Self::LowResolution => shrink(steps, size, LOW_RESOLUTION, filter),
            Self::Blur => blur(steps, size, f64::from(size.0.max(size.1)) * BLUR_SHARE),
        }
    }
}

/// The borders of `regions` on an image of this size, before `steps`.
#[must_use]
pub fn outline(steps: Vec<Step>, size: (u32, u32), regions: &[Region], highlight: Highlight) -> Vec<Step> {
    if regions.is_empty() {
        return steps;
    }
    let px = (f64::from(size.0.max(size.1)) * highlight.width_share).round().max(1.0) as u32;
    vec![Step::Outline { regions: regions.to_vec(), px, colour: highlight.colour, next: steps }]
}

fn shrink(steps: Vec<Step>, size: (u32, u32), scale: f64, filter: Filter) -> Vec<Step> {
    let side = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
    detour(steps, size, (side(size.0), side(size.1)), filter)
}

fn blur(steps: Vec<Step>, size: (u32, u32), sigma: f64) -> Vec<Step> {
    let factor = (sigma / MAX_SIGMA_PX).max(1.0);
    let side = |side: u32| ((f64::from(side) / factor).round() as u32).max(1);
    let small = (side(size.0), side(size.1));
    let gaussian = |next| Step::Resize { to: small, filter: Filter::Gaussian { sigma: sigma / factor }, next };
    if small == size {
        return vec![gaussian(steps)];
    }
    let next = vec![gaussian(grow(steps, size))];
    vec![Step::Resize { to: small, filter: Filter::Box, next }]
}

/// By way of a smaller picture.
fn detour(steps: Vec<Step>, size: (u32, u32), small: (u32, u32), filter: Filter) -> Vec<Step> {
    if small == size {
        return steps;
    }
    vec![Step::Resize { to: small, filter, next: grow(steps, size) }]
}

/// From a smaller picture to where `steps` begin: at once to the size they resize to, where each of them does.
fn grow(steps: Vec<Step>, size: (u32, u32)) -> Vec<Step> {
    if steps.iter().all(|step| matches!(step, Step::Resize { .. })) {
        return steps;
    }
    vec![Step::Resize { to: size, filter: Filter::Bilinear, next: steps }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write() -> Vec<Step> {
        vec![Step::Write { first: 0 }]
    }

    #[test]
    fn nothing_is_added_to_a_plain_view() {
        let plain = Degrade { scale: 1.0, blur_px: 0.0 };
        assert!(plain.is_plain());
        assert_eq!(plain.wrap(write(), (8, 8), Filter::Bicubic), write());
    }

    #[test]
    fn low_resolution_goes_straight_to_the_size_of_the_view() {
        let view = vec![Step::Resize { to: (64, 32), filter: Filter::Bicubic, next: write() }];
        let found = Degrade { scale: 0.25, blur_px: 0.0 }.wrap(view.clone(), (100, 50), Filter::Bicubic);
        assert_eq!(found, [Step::Resize { to: (25, 13), filter: Filter::Bicubic, next: view }]);
    }

    #[test]
    fn a_view_that_does_not_resize_gets_its_size_back() {
        let found = Neutral::Mean.wrap(write(), (10, 6), Filter::Bicubic);
        let back = Step::Resize { to: (10, 6), filter: Filter::Bilinear, next: write() };
        assert_eq!(found, [Step::Resize { to: (1, 1), filter: Filter::Box, next: vec![back] }]);
    }

    #[test]
    fn wide_blurs_are_done_on_a_small_picture() {
        let found = Neutral::Blur.wrap(write(), (1280, 640), Filter::Bicubic);
        let Step::Resize { to, filter: Filter::Box, next } = &found[0] else { panic!("{found:?}") };
        assert_eq!(*to, (128, 64));
        let Step::Resize { to, filter: Filter::Gaussian { sigma }, .. } = &next[0] else { panic!("{next:?}") };
        assert_eq!((*to, *sigma), ((128, 64), 4.0));
    }
}
