//! Prints rows in columns that are as wide as their widest cell.

use std::io::{self, Write};

/// Prints the heads and the rows.
///
/// # Errors
/// The output is closed.
pub(super) fn table<const N: usize>(
    out: &mut impl Write,
    heads: [&str; N],
    rows: &[[String; N]],
) -> io::Result<()> {
    let heads = heads.map(str::to_string);
    let rows: Vec<&[String; N]> = [&heads].into_iter().chain(rows).collect();
    let widths: Vec<usize> =
        (0..N).map(|at| rows.iter().map(|row| row[at].len()).max().unwrap_or(0)).collect();
    for row in rows {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}
