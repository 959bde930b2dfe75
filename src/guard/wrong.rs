//! What is wrong with a file of rules or a list that it names, and where. Who mends it wants to know all of it at once.

use anyhow::{Context, Error, Result, bail};

/// How many of the errors of a file are shown.
const WRONG_MAX: usize = 20;

/// What a file says, and how it is called.
pub(super) struct Text {
    pub name: String,
    pub text: String,
}

impl Text {
    /// A place in it, as FILE:LINE:COLUMN.
    pub fn at(&self, offset: usize) -> String {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!("{}:{line}:{column}", self.name)
    }

    /// The place of a part of it.
    pub fn at_part(&self, part: &str) -> String {
        self.at(self.offset(part))
    }

    /// Where a part of it begins.
    pub fn offset(&self, part: &str) -> usize {
        (part.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize)
    }
}

/// All that is wrong.
#[derive(Default)]
pub(super) struct Wrong(pub Vec<Error>);

impl Wrong {
    /// What a check led to; what failed is kept with its place.
    pub fn keep<T>(&mut self, result: Result<T>, place: impl FnOnce() -> String) -> Option<T> {
        result.with_context(place).map_err(|error| self.0.push(error)).ok()
    }

    pub fn end(mut self) -> Result<()> {
        if self.0.len() < 2 {
            return self.0.pop().map_or(Ok(()), Err);
        }
        let mut all = format!("{} things are wrong:", self.0.len());
        for error in self.0.iter().take(WRONG_MAX) {
            all.push_str(&format!("\n  {error:#}"));
        }
        if self.0.len() > WRONG_MAX {
            all.push_str("\n  ...");
        }
        bail!(all)
    }
}
