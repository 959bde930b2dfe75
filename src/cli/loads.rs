//! Programs that an attach has loaded. The kernel takes some 0.1 s to verify one, so interfaces whose programs are told the
//! same share one.

use anyhow::Result;

/// Programs of one kind, by what they were told.
pub(super) struct Loads<S, P> {
    loaded: Vec<(S, P)>,
}

impl<S: PartialEq + Copy, P> Loads<S, P> {
    pub fn new() -> Loads<S, P> {
        Loads { loaded: Vec::new() }
    }

    /// One that was told that; it is loaded if it is the first.
    pub fn get(&mut self, settings: S, load: impl FnOnce(S) -> Result<P>) -> Result<&P> {
        let at = match self.loaded.iter().position(|(known, _)| *known == settings) {
            Some(at) => at,
            None => {
                self.loaded.push((settings, load(settings)?));
                self.loaded.len() - 1
            }
        };
        Ok(&self.loaded[at].1)
    }

    /// The one that was loaded first.
    pub fn into_first(self) -> Option<P> {
        self.loaded.into_iter().next().map(|(_, program)| program)
    }
}
