//! Any bytes to pixels: refused or decoded, and a region is always the same part of the whole.
#![no_main]

use std::io::Cursor;

use imagine_opd_fuzz::Choices;
use libfuzzer_sys::fuzz_target;
use views::decode::{Policy, Wanted, can_scale, decode, decode_rows, scaled_size};
use views::errors::ImageFault;
use views::formats::read_header;
use views::geometry::Region;
use views::header::{Header, Limits};

/// Small, so that many files are tried; what libFuzzer lets through in one allocation follows from it.
const LIMITS: Limits = Limits { max_pixels: 1 << 18, max_bytes: 1 << 20 };

fuzz_target!(|input: &[u8]| {
    let Ok(header) = read_header(Cursor::new(input), LIMITS) else { return };
    assert!(u64::from(header.width) * u64::from(header.height) <= LIMITS.max_pixels);
    assert!(header.width > 0 && header.height > 0);
    let mut choices = Choices::new(input);
    let policy = Policy { alpha_white: choices.flag(), exif: choices.flag() };
    let header = if policy.exif { header } else { header.without_orientation() };
    let denominator = if can_scale(&header) { choices.pick(&[1, 2, 4, 8]) } else { 1 };
    let size = scaled_size(&header, denominator);
    let whole = collect(input, &header, policy, Wanted { region: Region::whole(size.0, size.1), denominator });
    if denominator == 1 {
        let decoded = decode(input, &header, policy).map(|image| image.pixels);
        assert_eq!(decoded, whole, "{header:?}");
    }
    // Every other region begins at a block, where there is no pixel to spare before it.
    for block in [1, 8, 1, 16] {
        let (left, top) = (choices.below(size.0) / block * block, choices.below(size.1) / block * block);
        let (width, height) = (1 + choices.below(size.0 - left), 1 + choices.below(size.1 - top));
        let region = Region { left, top, width, height };
        let part = collect(input, &header, policy, Wanted { region, denominator });
        // Of a damaged file the part before the damage may be there, or may not.
        if let Ok(whole) = &whole {
            let part = part.expect("the whole was decoded");
            let line = size.0 as usize * 3;
            let bytes = left as usize * 3..(left + width) as usize * 3;
            let rows = whole.chunks_exact(line).skip(top as usize).take(height as usize);
            let expected: Vec<u8> = rows.flat_map(|row| &row[bytes.clone()]).copied().collect();
            assert!(part == expected, "{region:?} of {header:?} at 1/{denominator}");
        }
    }
});

/// The rows of a region, which must be as many and as wide as it is.
fn collect(bytes: &[u8], header: &Header, policy: Policy, wanted: Wanted) -> Result<Vec<u8>, ImageFault> {
    let (mut pixels, mut count) = (Vec::new(), 0);
    decode_rows(bytes, header, policy, wanted, &mut |rows| {
        assert_eq!(rows.width(), wanted.region.width as usize);
        count += rows.count();
        assert!(count <= wanted.region.height as usize);
        pixels.extend(rows.iter().flatten());
        Ok(())
    })?;
    assert_eq!(count, wanted.region.height as usize);
    Ok(pixels)
}
