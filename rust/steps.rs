//! What is done with the pixels of one region, as a tree of steps: resize, pad, crop, outline, and write frames.
//!
//! A tree takes rows from top to bottom, a strip at a time, so that a strip is used while it is in the cache and
//! no picture in between is ever whole.

use std::mem::MaybeUninit;

use crate::errors::{ImageFault, allocate};
use crate::frames::FrameWriter;
use crate::geometry::Region;
use crate::normalize::{Normalizer, Sample};
use crate::patchify::{PatchWriter, Patches};
use crate::resize::Resize;
use crate::rgb::{BYTES, Emit, Rows};
use crate::weights::{Filter, Parity};

/// One step; it takes the rows of a picture from top to bottom and hands its own rows on to each of `next`.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// To another size (width, height), rounded to bytes as everywhere.
    Resize { to: (u32, u32), filter: Filter, next: Vec<Step> },
    /// Put at (`left`, `top`) of a picture of size `to`, the rest of it filled with one colour.
    Pad { left: u32, top: u32, to: (u32, u32), fill: [u8; 3], next: Vec<Step> },
    /// The pixels of `region` only.
    Crop { region: Region, next: Vec<Step> },
    /// The frames of these regions drawn on top, `px` wide, inside of them.
    Outline { regions: Vec<Region>, px: u32, colour: [u8; 3], next: Vec<Step> },
    /// Into the output, normalised: patches of the Qwen layout from patch `first` on, or square frames, cut row
    /// after row, from frame `first` on.
    Write { first: usize },
}

/// What the output is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Patches(Patches),
    /// Square frames of this side.
    Frames(usize),
}

impl Layout {
    /// Values in one patch or frame.
    #[must_use]
    pub fn features(&self) -> usize {
        match self {
            Self::Patches(patches) => patches.features(),
            Self::Frames(side) => 3 * side * side,
        }
    }

    /// Pixels in one patch or frame.
    #[must_use]
    pub fn pixels(&self) -> usize {
        match self {
            Self::Patches(patches) => patches.side * patches.side,
            Self::Frames(side) => side * side,
        }
    }
}

/// A tree of steps at work on one picture.
pub struct Work<'a, T> {
    nodes: Vec<Node>,
    normalizer: &'a Normalizer<T>,
    features: usize,
}

enum Node {
    Resize { resize: Box<Resize>, next: Vec<Node> },
    Pad { pad: Pad, next: Vec<Node> },
    Crop { region: Region, top: u32, next: Vec<Node> },
    Outline { outline: Outline, next: Vec<Node> },
    Patches { writer: PatchWriter, first: usize },
    Frames { writer: FrameWriter, first: usize },
}

impl<'a, T: Sample> Work<'a, T> {
    /// Makes `steps` ready for a picture of this size.
    pub fn new(
        steps: &[Step],
        size: (u32, u32),
        layout: Layout,
        parity: Parity,
        normalizer: &'a Normalizer<T>,
    ) -> Result<Self, ImageFault> {
        Ok(Self { nodes: build(steps, size, layout, parity)?, normalizer, features: layout.features() })
    }

    /// Takes the next rows of the picture; `out` is the output of all its `Write` steps.
    pub fn push(&mut self, rows: Rows<'_>, out: &mut [MaybeUninit<T>]) -> Result<(), ImageFault> {
        run(&mut self.nodes, rows, &mut Target { out, normalizer: self.normalizer, features: self.features })
    }

    /// Whether as many patches or frames were written as a view has.
    pub fn finish(self, frames: usize) -> Result<(), ImageFault> {
        let written = count_written(&self.nodes);
        if written == frames {
            return Ok(());
        }
        Err(ImageFault::Truncated(format!("{written} of {frames} patches or frames")))
    }
}

/// What was written is settled, also after a fault.
impl<T> Drop for Work<'_, T> {
    fn drop(&mut self) {
        self.normalizer.settle();
    }
}

fn count_written(nodes: &[Node]) -> usize {
    let count = |node: &Node| match node {
        Node::Patches { writer, .. } => writer.written(),
        Node::Frames { writer, .. } => writer.written(),
        Node::Resize { next, .. }
        | Node::Pad { next, .. }
        | Node::Crop { next, .. }
        | Node::Outline { next, .. } => count_written(next),
    };
    nodes.iter().map(count).sum()
}

struct Target<'o, T> {
    out: &'o mut [MaybeUninit<T>],
    normalizer: &'o Normalizer<T>,
    features: usize,
}

fn build(steps: &[Step], size: (u32, u32), layout: Layout, parity: Parity) -> Result<Vec<Node>, ImageFault> {
    let make = |step: &Step| {
        Ok(match step {
            Step::Resize { to, filter, next } => Node::Resize {
                resize: Box::new(Resize::new(size, *to, *filter, parity)?),
                next: build(next, *to, layout, parity)?,
            },
            Step::Pad { left, top, to, fill, next } => Node::Pad {
                pad: Pad::new(size, (*left, *top), *to, *fill)?,
                next: build(next, *to, layout, parity)?,
            },
            Step::Crop { region, next } => Node::Crop {
                region: *region,
                top: 0,
                next: build(next, (region.width, region.height), layout, parity)?,
            },
            Step::Outline { regions, px, colour, next } => Node::Outline {
                outline: Outline::new(size.0, regions.clone(), *px, *colour)?,
                next: build(next, size, layout, parity)?,
            },
            Step::Write { first } => match layout {
                Layout::Patches(patches) => {
                    Node::Patches { writer: PatchWriter::new(patches, size.0)?, first: *first }
                }
                Layout::Frames(side) => Node::Frames { writer: FrameWriter::new(side, size.0), first: *first },
            },
        })
    };
    steps.iter().map(make).collect()
}

fn run<T: Sample>(nodes: &mut [Node], rows: Rows<'_>, target: &mut Target<'_, T>) -> Result<(), ImageFault> {
    for node in nodes {
        match node {
            Node::Resize { resize, next } => resize.push(rows, &mut |rows| run(next, rows, target))?,
            Node::Pad { pad, next } => pad.push(rows, &mut |rows| run(next, rows, target))?,
            Node::Crop { region, top, next } => {
                let inside = rows.window(*top, *region);
                *top += rows.count() as u32;
                if let Some(rows) = inside {
                    run(next, rows, target)?;
                }
            }
            Node::Outline { outline, next } => outline.push(rows, &mut |rows| run(next, rows, target))?,
            Node::Patches { writer, first } => {
                writer.push(rows, target.normalizer, &mut target.out[*first * target.features..]);
            }
            Node::Frames { writer, first } => {
                writer.push(rows, target.normalizer, &mut target.out[*first * target.features..]);
            }
        }
    }
    Ok(())
}

/// A picture put on a larger one.
struct Pad {
    size: (u32, u32),
    place: (u32, u32),
    to: (u32, u32),
    /// A row of nothing but the filling, and one for the picture's row in its middle.
    empty: Vec<u8>,
    line: Vec<u8>,
    /// Rows taken.
    taken: u32,
}

impl Pad {
    fn new(size: (u32, u32), place: (u32, u32), to: (u32, u32), fill: [u8; 3]) -> Result<Self, ImageFault> {
        let mut empty = allocate(to.0 as usize * BYTES)?;
        empty.as_chunks_mut::<BYTES>().0.fill(fill);
        Ok(Self { size, place, to, line: empty.clone(), empty, taken: 0 })
    }

    fn push(&mut self, rows: Rows<'_>, emit: Emit<'_>) -> Result<(), ImageFault> {
        let empty = Rows::new(&self.empty, self.to.0 as usize, self.empty.len(), 1);
        if self.taken == 0 {
            for _ in 0..self.place.1 {
                emit(empty)?;
            }
        }
        let at = self.place.0 as usize * BYTES;
        for row in rows.iter() {
            self.line[at..at + row.len()].copy_from_slice(row);
            emit(Rows::new(&self.line, self.to.0 as usize, self.line.len(), 1))?;
            self.taken += 1;
        }
        if self.taken == self.size.1 {
            for _ in self.place.1 + self.size.1..self.to.1 {
                emit(empty)?;
            }
        }
        Ok(())
    }
}

/// The borders of regions drawn on a picture.
struct Outline {
    regions: Vec<Region>,
    px: u32,
    colour: [u8; 3],
    line: Vec<u8>,
    /// Rows taken.
    taken: u32,
}

impl Outline {
    fn new(width: u32, regions: Vec<Region>, px: u32, colour: [u8; 3]) -> Result<Self, ImageFault> {
        Ok(Self { regions, px, colour, line: allocate(width as usize * BYTES)?, taken: 0 })
    }

    fn push(&mut self, rows: Rows<'_>, emit: Emit<'_>) -> Result<(), ImageFault> {
        for row in rows.iter() {
            self.line.copy_from_slice(row);
            let pixels = self.line.as_chunks_mut::<BYTES>().0;
            let y = self.taken;
            for region in self.regions.iter().filter(|region| region.top <= y && y < region.top + region.height) {
                let (left, right) = (region.left as usize, (region.left + region.width) as usize);
                let whole = y < region.top + self.px || y + self.px >= region.top + region.height;
                let px = if whole { right - left } else { (self.px as usize).min(right - left) };
                pixels[left..left + px].fill(self.colour);
                pixels[right - px..right].fill(self.colour);
            }
            self.taken += 1;
            emit(Rows::new(&self.line, rows.width(), self.line.len(), 1))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::normalize::{Scaling, unwritten};

    fn make(steps: &[Step], size: (u32, u32), side: usize, frames: usize, pixels: &[u8]) -> Vec<u8> {
        let scaling = Scaling { mean: [0.0; 3], std: [1.0; 3], rescale_factor: 1.0 };
        let normalizer = Normalizer::<u8>::new(scaling, Parity::Torchvision);
        let layout = Layout::Frames(side);
        let mut out = vec![77; frames * layout.features()];
        let mut work = Work::new(steps, size, layout, Parity::Torchvision, &normalizer).unwrap();
        let (width, line) = (size.0 as usize, size.0 as usize * BYTES);
        for strip in pixels.chunks(2 * line) {
            work.push(Rows::new(strip, width, line, strip.len() / line), unwritten(&mut out)).unwrap();
        }
        out
    }

    fn greys(values: &[u8]) -> Vec<u8> {
        values.iter().flat_map(|&value| [value; 3]).collect()
    }

    #[test]
    fn padding_surrounds_the_picture() {
        let steps =
            [Step::Pad { left: 1, top: 1, to: (4, 4), fill: [9, 8, 7], next: vec![Step::Write { first: 0 }] }];
        let out = make(&steps, (2, 3), 4, 1, &greys(&[1, 2, 3, 4, 5, 6]));
        assert_eq!(out[..16], [9, 9, 9, 9, 9, 1, 2, 9, 9, 3, 4, 9, 9, 5, 6, 9]);
        assert_eq!(out[16..20], [8, 8, 8, 8]);
        assert_eq!(out[32..36], [7, 7, 7, 7]);
    }

    #[test]
    fn one_picture_feeds_every_branch() {
        let crop = |left, top| Region { left, top, width: 2, height: 2 };
        let branch = |region, first| Step::Crop { region, next: vec![Step::Write { first }] };
        let steps = [branch(crop(1, 1), 1), branch(crop(0, 0), 0)];
        let out = make(&steps, (3, 3), 2, 2, &greys(&[1, 2, 3, 4, 5, 6, 7, 8, 9]));
        assert_eq!(out[..4], [1, 2, 4, 5]);
        assert_eq!(out[12..16], [5, 6, 8, 9]);
    }

    #[test]
    fn outline_stays_inside_its_region() {
        let region = Region { left: 1, top: 0, width: 3, height: 3 };
        let next = vec![Step::Write { first: 0 }];
        let steps = [Step::Outline { regions: vec![region], px: 1, colour: [255, 0, 0], next }];
        let out = make(&steps, (4, 4), 4, 1, &greys(&[5; 16]));
        let f = 255;
        assert_eq!(out[..16], [5, f, f, f, 5, f, 5, f, 5, f, f, f, 5, 5, 5, 5]);
        assert_eq!(out[16..32], [5, 0, 0, 0, 5, 0, 5, 0, 5, 0, 0, 0, 5, 5, 5, 5]);
    }
}
