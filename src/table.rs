//! Tables for people: aligned columns, nothing around them.

use std::{fmt::Write as _, io};

/// Between columns.
const GAP: &str = "  ";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    /// Numbers.
    Right,
}

/// Rows under a heading.
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<T: Into<String>>(columns: impl IntoIterator<Item = (T, Align)>) -> Self {
        let own = |(name, align): (T, Align)| (name.into(), align);
        Self {
            columns: columns.into_iter().map(own).collect(),
            rows: Vec::new(),
        }
    }

    /// Names come from others, and must not drive the terminal.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let harmless = |cell: String| cell.replace(char::is_control, "\u{fffd}");
        self.rows.push(cells.into_iter().map(harmless).collect());
    }

    pub fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        let heading: Vec<_> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        self.print_these(out, Some(&heading))
    }

    /// Without the heading.
    pub fn print_rows(&self, out: &mut impl io::Write) -> io::Result<()> {
        self.print_these(out, None)
    }

    fn print_these(
        &self,
        out: &mut impl io::Write,
        heading: Option<&Vec<String>>,
    ) -> io::Result<()> {
        let all = || heading.into_iter().chain(&self.rows);
        let width = |n: usize| {
            let cells = all().filter_map(|row| row.get(n));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.columns.len()).map(width).collect();
        for row in all() {
            let mut line = String::new();
            for ((cell, (_, align)), width) in row.iter().zip(&self.columns).zip(&widths) {
                // Cannot fail: it is a text.
                let _ = match align {
                    Align::Left => write!(line, "{cell:<width$}{GAP}"),
                    Align::Right => write!(line, "{cell:>width$}{GAP}"),
                };
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_cells_are_harmless() {
        let mut table = Table::new([("room", Align::Left), ("streams", Align::Right)]);
        table.row(["grün".to_owned(), "1".to_owned()]);
        table.row(["r\u{1b}[2J".to_owned(), "10000000".to_owned()]);
        let mut out = Vec::new();
        table.print(&mut out).expect("printed");
        let expected = "room    streams\ngrün          1\nr\u{fffd}[2J  10000000\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }
}
