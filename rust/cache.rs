//! Finished views by the content they came from, up to a number of bytes: what was used last stays.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// BLAKE3 of the image's bytes and of all that was done with them.
pub type Key = [u8; 32];

#[derive(Default)]
struct Entries {
    /// Bytes of a view, and when it was used last.
    views: HashMap<Key, (Arc<Vec<u8>>, u64)>,
    by_use: BTreeMap<u64, Key>,
    held_bytes: usize,
    uses: u64,
    hits: u64,
}

/// Safe to share between threads.
#[derive(Default)]
pub struct Cache(Mutex<Entries>);

impl Cache {
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<Arc<Vec<u8>>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Entries { views, by_use, uses, hits, .. } = &mut *entries;
        let (view, used) = views.get_mut(key)?;
        by_use.remove(used);
        *uses += 1;
        *hits += 1;
        *used = *uses;
        by_use.insert(*uses, *key);
        Some(Arc::clone(view))
    }

    /// Keeps `view`, and lets go of those unused for longest until all fit in `max_bytes`. A view larger than that
    /// is not kept.
    pub fn put(&self, key: Key, view: &[u8], max_bytes: usize) {
        let mut copy = Vec::new();
        if view.len() > max_bytes || copy.try_reserve_exact(view.len()).is_err() {
            return;
        }
        copy.extend_from_slice(view);
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.views.contains_key(&key) {
            return;
        }
        entries.shrink(max_bytes - view.len());
        entries.uses += 1;
        let used = entries.uses;
        entries.views.insert(key, (Arc::new(copy), used));
        entries.by_use.insert(used, key);
        entries.held_bytes += view.len();
    }

    /// (views held, their bytes, hits so far).
    #[must_use]
    pub fn stats(&self) -> (usize, usize, u64) {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (entries.views.len(), entries.held_bytes, entries.hits)
    }

    /// Lets go of all views.
    pub fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Entries::default();
    }
}

impl Entries {
    fn shrink(&mut self, max_bytes: usize) {
        while self.held_bytes > max_bytes {
            let Some((_, key)) = self.by_use.pop_first() else { return };
            if let Some((view, _)) = self.views.remove(&key) {
                self.held_bytes -= view.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_used_views_go_first() {
        let cache = Cache::default();
        for key in 1..=3 {
            cache.put([key; 32], &[key; 10], 30);
        }
        assert_eq!(cache.get(&[1; 32]).unwrap()[..], [1; 10]);
        cache.put([4; 32], &[4; 15], 30);
        let held = [1, 2, 3, 4].map(|key| cache.get(&[key; 32]).is_some());
        assert_eq!(held, [true, false, false, true]);
        assert_eq!(cache.stats(), (2, 25, 3));
        cache.put([5; 32], &[5; 31], 30);
        assert_eq!(cache.stats().0, 2);
        cache.clear();
        assert_eq!(cache.stats(), (0, 0, 0));
    }
}
