//! One decoded image: its size and its pixels, eight bits a channel.

/// Pixels in rows, three bytes each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}
