//! What is said to a person beside the output proper, on standard error. That nobody listens is no failure.

/// Prints a line on standard error, if that works.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}
