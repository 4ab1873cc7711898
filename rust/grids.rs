//! Which grid or size each tiling family picks for an image: the numbers alone, float for float as transformers.

/// Width and height in pixels.
pub type Size = (u32, u32);

/// Idefics3 never resizes to a longer side than this, whatever its size says.
const IDEFICS3_MAX_SIDE: u64 = 4096;

/// `InternVL`'s (rows, columns) nearest to the image's aspect, from `min_tiles` to `max_tiles` in all.
#[must_use]
pub fn choose_grid((width, height): Size, frame: u32, min_tiles: u32, max_tiles: u32) -> (u64, u64) {
    let aspect = f64::from(width) / f64::from(height);
    let pixels = u128::from(width) * u128::from(height);
    let tile = u128::from(frame) * u128::from(frame);
    let mut best = (1, 1);
    let mut least = f64::INFINITY;
    // The reference sorts by area and, in an area, by columns; so do these loops.
    for area in u64::from(min_tiles).max(1)..=u64::from(max_tiles) {
        for columns in (1..=area).filter(|columns| area % columns == 0) {
            let rows = area / columns;
            let distance = (aspect - columns as f64 / rows as f64).abs();
            // Of two as near, the larger, as long as it is at most twice the image.
            let enough = 2 * pixels > tile * u128::from(area);
            if distance < least || (distance <= least && enough) {
                least = distance;
                best = (rows, columns);
            }
        }
    }
    best
}

/// `LLaVA`'s pinpoint, (height, width) of those given, that keeps most of the image's pixels, and of those the one with
/// the smallest bars.
#[must_use]
pub fn choose_pinpoint((width, height): Size, pinpoints: &[(u32, u32)]) -> Option<Size> {
    let pixels = u128::from(width) * u128::from(height);
    let (w, h) = (f64::from(width), f64::from(height));
    let mut best = None;
    for &(to_height, to_width) in pinpoints {
        let scale = (f64::from(to_width) / w).min(f64::from(to_height) / h);
        // Below 2^33 each: a scaled side is at most an ulp over the pinpoint's.
        let kept = u128::from((w * scale) as u64) * u128::from((h * scale) as u64);
        let kept = kept.min(pixels);
        let wasted = i128::from(u64::from(to_width) * u64::from(to_height)) - kept as i128;
        let better = best.is_none_or(|(most, least, _)| kept > most || (kept == most && wasted < least));
        if better {
            best = Some((kept, wasted, (to_width, to_height)));
        }
    }
    best.map(|(_, _, size)| size)
}

/// `LLaVA`: the largest size of the image's aspect inside `canvas`.
#[must_use]
pub fn fit_inside((width, height): Size, canvas: Size) -> Size {
    let (scale_w, scale_h) = (f64::from(canvas.0) / f64::from(width), f64::from(canvas.1) / f64::from(height));
    if scale_w < scale_h {
        (canvas.0, ((f64::from(height) * scale_w).ceil() as u32).min(canvas.1))
    } else {
        (((f64::from(width) * scale_h).ceil() as u32).min(canvas.0), canvas.1)
    }
}

/// Idefics3's first resize: (width, height) with the longer side at `edge`, the other even, both at most 4096.
#[must_use]
pub fn fit_longest_edge((width, height): Size, edge: u32) -> (u64, u64) {
    let aspect = f64::from(width) / f64::from(height);
    let longest = u64::from(edge);
    let even = |side: f64| {
        let side = side as u64;
        (side + side % 2).max(1)
    };
    let (width, height) = if width >= height {
        (longest, even(f64::from(edge) / aspect))
    } else {
        (even(f64::from(edge) * aspect), longest)
    };
    // Evening may have made the other side the longer one, hence the second look.
    let aspect = width as f64 / height as f64;
    let cap = IDEFICS3_MAX_SIDE;
    if width >= height && width > cap {
        (cap, ((cap as f64 / aspect) as u64).max(1))
    } else if height > width && height > cap {
        (((cap as f64 * aspect) as u64).max(1), cap)
    } else {
        (width, height)
    }
}

/// Idefics3's second resize: up to whole tiles, the other side by the grown longer one.
#[must_use]
pub fn whole_tiles((width, height): Size, frame: u64) -> (u64, u64) {
    let aspect = f64::from(width) / f64::from(height);
    let round_up = |side: u64| side.div_ceil(frame).max(1) * frame;
    if width >= height {
        let width = round_up(width.into());
        (width, round_up((width as f64 / aspect) as u64))
    } else {
        let height = round_up(height.into());
        (round_up((height as f64 * aspect) as u64), height)
    }
}
