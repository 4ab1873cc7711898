//! The list of modules: image views from encoded bytes to patches, in the order the data takes.

pub mod errors;
pub mod geometry;
pub mod rgb;

pub mod header;

pub mod decode;
pub mod orient;
pub mod resize;

pub mod patchify;

pub mod batch;

#[cfg(feature = "python")]
mod python;
