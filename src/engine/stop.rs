//! Stop strings: output text is held back while it may be the start of one.

/// The output text of one choice on its way out.
#[derive(Clone, Debug)]
pub(super) struct StopText {
    stops: Vec<String>,
    /// Text that may yet turn out to be the start of a stop string.
    held: String,
}

impl StopText {
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Takes new text in. Returns what may go out, and the stop string that appeared, if one did: then the text ends
    /// before it.
    pub fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let found = (self.stops.iter())
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|&(at, stop)| (at, std::cmp::Reverse(stop.len())));
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let keep = starts
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Everything that is still held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>, String) {
        let mut text = StopText::new(&stops.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        let mut out = Vec::new();
        for piece in pieces {
            let (emitted, stop) = text.push(piece);
            out.push(emitted);
            if stop.is_some() {
                return (out, stop, text.finish());
            }
        }
        (out, None, text.finish())
    }

    #[test]
    fn a_stop_string_over_several_pieces_ends_the_text_before_it() {
        let (out, stop, rest) = run(&["END"], &["ab", "cE", "N", "D more"]);
        assert_eq!((out.concat().as_str(), stop.as_deref(), rest.as_str()), ("abc", Some("END"), ""));
    }

    #[test]
    fn text_is_held_only_while_it_may_be_a_stop() {
        let (out, stop, rest) = run(&["END", "\n\n"], &["a E", "Nx\n", "y\n"]);
        assert_eq!(out, ["a ", "ENx", "\ny"]);
        assert_eq!((stop, rest.as_str()), (None, "\n"));
    }

    #[test]
    fn the_earliest_stop_wins_and_characters_stay_whole() {
        let (out, stop, _) = run(&["cd", "bc", "é"], &["aé", "bcd"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("a", Some("é")));
        let (out, stop, _) = run(&["cd", "bc"], &["ü", "bcd"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("ü", Some("bc")));
    }

    #[test]
    fn without_stops_everything_goes_out_at_once() {
        assert_eq!(run(&[], &["a", "", "b"]).0, ["a", "", "b"]);
    }
}
