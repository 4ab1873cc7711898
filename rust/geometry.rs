//! Boxes on an image: checked, grown by a margin and to a minimum side, cut to whole pixels inside the image.

use crate::errors::BoxFault;

/// How far a box may stick out of its image and still be taken for rounding.
const SLACK_PX: f64 = 1.0;

/// A box as given: pixels of the original image after EXIF, right and bottom excluded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PixelBox {
    pub x0: f64,
    pub y0: f64,
    pub x1: f64,
    pub y1: f64,
    pub image: i64,
}

impl PixelBox {
    /// The box as the user wrote it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("({}, {}, {}, {})", self.x0, self.y0, self.x1, self.y1)
    }
}

/// Whole pixels inside an image, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

impl Region {
    /// The whole of an image.
    #[must_use]
    pub fn whole(width: u32, height: u32) -> Self {
        Self { left: 0, top: 0, width, height }
    }
}

impl Region {
    fn right(&self) -> u32 {
        self.left + self.width
    }

    fn bottom(&self) -> u32 {
        self.top + self.height
    }

    fn area(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }

    /// The pixels that both have.
    #[must_use]
    pub fn shared_area(&self, other: &Self) -> u64 {
        let side = |start: u32, end: u32| u64::from(end.saturating_sub(start));
        let width = side(self.left.max(other.left), self.right().min(other.right()));
        width * side(self.top.max(other.top), self.bottom().min(other.bottom()))
    }

    /// The smallest region around both.
    #[must_use]
    pub fn around(&self, other: &Self) -> Self {
        let (left, top) = (self.left.min(other.left), self.top.min(other.top));
        let (right, bottom) = (self.right().max(other.right()), self.bottom().max(other.bottom()));
        Self { left, top, width: right - left, height: bottom - top }
    }
}

/// Joins regions of one image that share more than `overlap` of the smaller one's pixels, until none do; the joined
/// one stands where the first of them stood. Beside each result, the places of its parts in `regions`.
#[must_use]
pub fn merge_regions(regions: &[Region], overlap: f64) -> Vec<(Region, Vec<usize>)> {
    let mut merged: Vec<(Region, Vec<usize>)> = Vec::new();
    for (place, region) in regions.iter().enumerate() {
        let mut whole = (*region, vec![place]);
        let touches = |a: &Region, b: &Region| a.shared_area(b) as f64 > overlap * a.area().min(b.area()) as f64;
        // What grew may reach others: looked through again until nothing does.
        let mut at = merged.len();
        while let Some(found) = merged.iter().position(|(other, _)| touches(other, &whole.0)) {
            let (other, mut parts) = merged.remove(found);
            parts.append(&mut whole.1);
            whole = (other.around(&whole.0), parts);
            at = at.min(found).min(merged.len());
        }
        whole.1.sort_unstable();
        merged.insert(at, whole);
    }
    merged
}

/// The order in which the regions of one image are read: line by line from the top, each from the left. A region
/// belongs to a line when its middle is above the bottom of the line's first one.
#[must_use]
pub fn reading_order(regions: &[Region]) -> Vec<usize> {
    let mut from_top: Vec<usize> = (0..regions.len()).collect();
    from_top.sort_by_key(|&place| (regions[place].top, regions[place].left));
    let mut order = Vec::with_capacity(regions.len());
    let mut rest = &from_top[..];
    while let Some(&first) = rest.first() {
        let middle = |place: &usize| regions[*place].top + regions[*place].height / 2;
        let line = rest.iter().take_while(|place| **place == first || middle(place) < regions[first].bottom());
        let (line, after) = rest.split_at(line.count());
        let start = order.len();
        order.extend_from_slice(line);
        order[start..].sort_by_key(|&place| regions[place].left);
        rest = after;
    }
    order
}

/// How a box becomes a crop.
#[derive(Debug, Clone, Copy)]
pub struct CropRule {
    /// Share of the box's own side added on each edge.
    pub margin: f64,
    /// Smallest side of a crop in pixels, as far as the image has them.
    pub min_side: u32,
}

/// Checks `pixel_box` against its image and returns the pixels to cut.
pub fn place_crop(pixel_box: &PixelBox, width: u32, height: u32, rule: CropRule) -> Result<Region, BoxFault> {
    let PixelBox { x0, y0, x1, y1, .. } = *pixel_box;
    if ![x0, y0, x1, y1].iter().all(|side| side.is_finite()) {
        return Err(BoxFault::NotFinite);
    }
    if x0 > x1 || y0 > y1 {
        return Err(BoxFault::Reversed);
    }
    if x0 >= x1 {
        return Err(BoxFault::Empty { side: "width" });
    }
    if y0 >= y1 {
        return Err(BoxFault::Empty { side: "height" });
    }
    let outside = BoxFault::Outside { width, height };
    let (left, right) = place_side(x0, x1, width, rule).ok_or(outside.clone())?;
    let (top, bottom) = place_side(y0, y1, height, rule).ok_or(outside)?;
    Ok(Region { left, top, width: right - left, height: bottom - top })
}

/// One axis of `place_crop`; `None` when the side leaves the image by more than `SLACK_PX`, or altogether.
fn place_side(start: f64, end: f64, size: u32, rule: CropRule) -> Option<(u32, u32)> {
    let limit = f64::from(size);
    if start < -SLACK_PX || end > limit + SLACK_PX {
        return None;
    }
    let (start, end) = (start.max(0.0), end.min(limit));
    if start >= end {
        return None;
    }
    let grow = (end - start) * rule.margin;
    // In range after the clamp: 0 <= first < last <= size.
    let mut first = (start - grow).max(0.0).floor() as u32;
    let mut last = (end + grow).min(limit).ceil() as u32;
    let min_side = rule.min_side.min(size);
    if last - first < min_side {
        let missing = min_side - (last - first);
        first = first.saturating_sub(missing / 2).min(size - min_side);
        last = first + min_side;
    }
    Some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: CropRule = CropRule { margin: 0.0, min_side: 1 };

    fn place(sides: [f64; 4], rule: CropRule) -> Result<[u32; 4], BoxFault> {
        let [x0, y0, x1, y1] = sides;
        place_crop(&PixelBox { x0, y0, x1, y1, image: 0 }, 100, 50, rule)
            .map(|found| [found.left, found.top, found.left + found.width, found.top + found.height])
    }

    fn regions(sides: &[[u32; 4]]) -> Vec<Region> {
        sides.iter().map(|&[left, top, width, height]| Region { left, top, width, height }).collect()
    }

    #[test]
    fn overlapping_regions_become_one_where_the_first_stood() {
        let apart = [[50, 50, 10, 10], [0, 0, 10, 10], [9, 0, 10, 10], [80, 0, 4, 4]];
        let found = |overlap| merge_regions(&regions(&apart), overlap);
        assert_eq!(found(0.1).len(), 4); // a tenth is not more than a tenth
        let merged = found(0.05);
        assert_eq!(merged[1], (Region { left: 0, top: 0, width: 19, height: 10 }, vec![1, 2]));
        assert_eq!((merged.len(), merged[2].1.clone()), (3, vec![3]));
        // The third joins the first two, which did not touch.
        let bridge = regions(&[[0, 0, 10, 10], [20, 0, 10, 10], [5, 0, 20, 10]]);
        assert_eq!(merge_regions(&bridge, 0.3), [(regions(&[[0, 0, 30, 10]])[0], vec![0, 1, 2])]);
    }

    #[test]
    fn regions_are_read_line_by_line() {
        // Two lines; the second region of the upper one begins lower than the first.
        let found =
            reading_order(&regions(&[[60, 100, 20, 20], [50, 14, 10, 10], [0, 10, 40, 20], [0, 110, 9, 9]]));
        assert_eq!(found, [2, 1, 3, 0]);
        assert_eq!(reading_order(&[]), [0; 0]);
    }

    #[test]
    fn crop_covers_the_box_and_stays_inside() {
        let outside = Err(BoxFault::Outside { width: 100, height: 50 });
        let table = [
            ([10.0, 5.0, 30.0, 25.0], PLAIN, Ok([10, 5, 30, 25])),
            ([10.2, 5.7, 29.1, 24.9], PLAIN, Ok([10, 5, 30, 25])),
            ([10.0, 5.0, 30.0, 25.0], CropRule { margin: 0.5, min_side: 1 }, Ok([0, 0, 40, 35])),
            ([-1.0, -1.0, 101.0, 51.0], PLAIN, Ok([0, 0, 100, 50])),
            ([98.0, 48.0, 100.0, 50.0], CropRule { margin: 0.0, min_side: 28 }, Ok([72, 22, 100, 50])),
            ([0.0, 0.0, 2.0, 2.0], CropRule { margin: 0.0, min_side: 28 }, Ok([0, 0, 28, 28])),
            ([50.0, 20.0, 51.0, 21.0], CropRule { margin: 0.0, min_side: 11 }, Ok([45, 15, 56, 26])),
            ([50.0, 20.0, 51.0, 21.0], CropRule { margin: 0.0, min_side: 999 }, Ok([0, 0, 100, 50])),
            ([-1.5, 0.0, 10.0, 10.0], PLAIN, outside.clone()),
            ([90.0, 0.0, 101.5, 10.0], PLAIN, outside.clone()),
            ([-1.0, 0.0, -0.5, 10.0], PLAIN, outside),
            ([9.0, 4.0, 9.0, 20.0], PLAIN, Err(BoxFault::Empty { side: "width" })),
            ([9.0, 4.0, 19.0, 4.0], PLAIN, Err(BoxFault::Empty { side: "height" })),
            ([10.0, 4.0, 9.0, 20.0], PLAIN, Err(BoxFault::Reversed)),
            ([f64::NAN, 4.0, 9.0, 20.0], PLAIN, Err(BoxFault::NotFinite)),
        ];
        for (sides, rule, expected) in table {
            assert_eq!(place(sides, rule), expected, "{sides:?} {rule:?}");
        }
    }
}
