//! Where an image is (encoded bytes, a file, pixels in memory), and how to look at it and read it within limits.

use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use crate::decode::Policy;
use crate::errors::{ImageFault, catch_panic};
use crate::formats::read_header;
use crate::header::{Header, Limits, check_pixels, name_io_fault};
use crate::rgb::{BYTES, Rows};

/// Where an image is.
#[derive(Debug, Clone)]
pub enum Source<'a> {
    Bytes(&'a [u8]),
    Path(PathBuf),
    /// Decoded: rows of RGB8 pixels without gaps.
    Pixels {
        pixels: &'a [u8],
        width: u32,
        height: u32,
    },
}

/// What makes two sources the same image: the path, or the very same bytes in memory (not equal ones: comparing
/// megabytes costs more than it saves).
#[derive(PartialEq, Eq, Hash)]
pub enum SourceKey<'r> {
    Memory(*const u8, usize, u32),
    Path(&'r Path),
}

/// What is known of an image before it is decoded.
#[derive(Debug, Clone)]
pub struct Probe {
    /// (width, height) of the upright image: the frame in which boxes are given.
    pub size: (u32, u32),
    /// Of encoded images.
    pub header: Option<Header>,
}

impl Source<'_> {
    /// The path, or for images in memory their place in the row.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Bytes(bytes) => format!("{index} ({} bytes)", bytes.len()),
            Self::Pixels { width, height, .. } => format!("{index} (an array of {width}x{height} pixels)"),
        }
    }

    #[must_use]
    pub fn key(&self) -> SourceKey<'_> {
        match self {
            Self::Bytes(bytes) => SourceKey::Memory(bytes.as_ptr(), bytes.len(), 0),
            Self::Path(path) => SourceKey::Path(path),
            Self::Pixels { pixels, width, .. } => SourceKey::Memory(pixels.as_ptr(), pixels.len(), *width),
        }
    }

    /// Reads the header, and refuses what is over `limits`.
    pub fn probe(&self, limits: Limits, policy: Policy) -> Result<Probe, ImageFault> {
        let header = match self {
            Self::Bytes(bytes) => catch_panic(|| {
                check_bytes(bytes.len() as u64, limits)?;
                read_header(Cursor::new(*bytes), limits)
            })?,
            Self::Path(path) => catch_panic(|| read_header(BufReader::new(open_file(path, limits)?), limits))?,
            &Self::Pixels { pixels, width, height } => {
                if width == 0 || height == 0 || pixels.len() != width as usize * height as usize * BYTES {
                    return Err(ImageFault::Undecodable(format!("its array has {} bytes", pixels.len())));
                }
                check_pixels(width, height, limits)?;
                return Ok(Probe { size: (width, height), header: None });
            }
        };
        let header = if policy.exif { header } else { header.without_orientation() };
        Ok(Probe { size: header.size(), header: Some(header) })
    }
}

/// The rows of pixels in memory.
#[must_use]
pub fn array_rows(pixels: &[u8], width: u32, height: u32) -> Rows<'_> {
    Rows::new(pixels, width as usize, width as usize * BYTES, height as usize)
}

fn open_file(path: &Path, limits: Limits) -> Result<File, ImageFault> {
    // Looked at before it is opened: opening a pipe would wait for its writer.
    let found = path.metadata().map_err(|error| name_io_fault(&error))?;
    if found.is_dir() {
        return Err(ImageFault::Unreadable("it is a directory".into()));
    }
    if !found.is_file() {
        return Err(ImageFault::Unreadable("it is not a regular file".into()));
    }
    check_bytes(found.len(), limits)?;
    File::open(path).map_err(|error| name_io_fault(&error))
}

/// The bytes of a file.
pub fn read_file(path: &Path, limits: Limits) -> Result<Vec<u8>, ImageFault> {
    let mut bytes = Vec::new();
    let limit = limits.max_bytes.saturating_add(1);
    let file = open_file(path, limits)?;
    // All of it at once and a byte more, so that its end is found without growing.
    let len = file.metadata().map_or(0, |found| found.len()).min(limit) as usize + 1;
    bytes.try_reserve_exact(len).map_err(|_| ImageFault::OutOfMemory(len))?;
    file.take(limit).read_to_end(&mut bytes).map_err(|error| name_io_fault(&error))?;
    check_bytes(bytes.len() as u64, limits)?;
    Ok(bytes)
}

fn check_bytes(found: u64, limits: Limits) -> Result<(), ImageFault> {
    if found > limits.max_bytes {
        return Err(ImageFault::TooManyBytes { found, limit: limits.max_bytes });
    }
    Ok(())
}
