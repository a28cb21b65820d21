//! Sets of completion indexes, kept as ranges: a Job may have a hundred thousand.

use std::fmt;

/// Ranges, both ends included, in order and not touching each other. Written `0,2-4,7`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Indexes(Vec<(i32, i32)>);

impl Indexes {
    /// Those of `text` below `completions`; what can't be read is left out.
    pub fn parse(text: &str, completions: i32) -> Indexes {
        let mut all = Indexes::default();
        for range in text.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) else { continue };
            let last = last.min(completions.saturating_sub(1));
            if first >= 0 && first <= last {
                all.push(first, last);
            }
        }
        all
    }

    /// Adds a range that does not begin before the last one does.
    fn push(&mut self, first: i32, last: i32) {
        match self.0.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => self.0.push((first, last)),
        }
    }

    pub fn with(&self, other: &Indexes) -> Indexes {
        let mut ranges = [self.0.as_slice(), other.0.as_slice()].concat();
        ranges.sort_unstable();
        let mut all = Indexes::default();
        ranges.into_iter().for_each(|(first, last)| all.push(first, last));
        all
    }

    pub fn has(&self, index: i32) -> bool {
        let at = self.0.partition_point(|(_, last)| *last < index);
        self.0.get(at).is_some_and(|(first, _)| *first <= index)
    }

    pub fn len(&self) -> i32 {
        self.0.iter().map(|(first, last)| last - first + 1).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many indexes are in both.
    pub fn common(&self, other: &Indexes) -> i32 {
        let (mut left, mut right) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut common = 0;
        while let (Some((a, b)), Some((c, d))) = (left.peek(), right.peek()) {
            common += (b.min(d) - a.max(c) + 1).max(0);
            if b < d {
                left.next()
            } else {
                right.next()
            };
        }
        common
    }

    /// The indexes below `completions` that are not in the set.
    pub fn missing(&self, completions: i32) -> impl Iterator<Item = i32> {
        let ends = self.0.iter().copied().chain([(completions, completions)]);
        let gaps = ends.scan(0, |next, (first, last)| {
            let gap = *next..first;
            *next = last + 1;
            Some(gap)
        });
        gaps.flatten()
    }
}

impl FromIterator<i32> for Indexes {
    fn from_iter<I: IntoIterator<Item = i32>>(indexes: I) -> Indexes {
        let mut indexes: Vec<i32> = indexes.into_iter().collect();
        indexes.sort_unstable();
        let mut all = Indexes::default();
        indexes.into_iter().for_each(|index| all.push(index, index));
        all
    }
}

impl fmt::Display for Indexes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (n, (first, last)) in self.0.iter().enumerate() {
            let comma = if n > 0 { "," } else { "" };
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first},{last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> Indexes {
        Indexes::parse(text, 100)
    }

    #[test]
    fn indexes_are_written_as_ranges() {
        for text in ["", "0", "1,2", "1-3", "0,2-4,7"] {
            assert_eq!(set(text).to_string(), text);
        }
        assert_eq!(Indexes::parse("1-3,5,8-12,x,20", 10).to_string(), "1-3,5,8,9");
        assert_eq!([7, 3, 2, 0, 4, 3].into_iter().collect::<Indexes>().to_string(), "0,2-4,7");
    }

    #[test]
    fn sets_of_indexes_are_compared() {
        let both = set("0-3,9").with(&set("2,4,11"));
        assert_eq!((both.to_string().as_str(), both.len()), ("0-4,9,11", 7));
        assert!(both.has(4) && both.has(11) && !both.has(5) && !both.has(12));
        assert_eq!(set("0-3,9").common(&set("2-20")), 3);
        assert_eq!(set("0,2,4").common(&set("1,3,5")), 0);
        assert_eq!(set("1,3-4").missing(7).collect::<Vec<_>>(), [0, 2, 5, 6]);
        assert_eq!(set("").missing(2).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(set("0-6").missing(7).count(), 0);
    }
}
