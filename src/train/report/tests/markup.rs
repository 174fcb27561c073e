//! A look at HTML that is strict enough for pages of our own: every tag is closed, in order, and every attribute quoted.

/// Elements without an end.
const VOID: [&str; 3] = ["meta", "br", "hr"];

/// A tag or a text.
enum Piece<'a> {
    Open { name: &'a str, attributes: &'a str, closed: bool },
    Close(&'a str),
    Text(&'a str),
}

fn pieces(page: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = page.strip_prefix("<!doctype html>").expect("a doctype");
    while let Some(at) = rest.find('<') {
        pieces.push(Piece::Text(&rest[..at]));
        let (tag, after) = rest[at + 1..].split_once('>').expect("a tag ends");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            pieces.push(Piece::Close(name));
            continue;
        }
        let closed = tag.ends_with('/');
        let tag = tag.trim_end_matches('/');
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        assert!(!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric()), "<{tag}> is no tag");
        pieces.push(Piece::Open { name, attributes, closed });
        if name == "style" {
            let (style, after) = rest.split_once("</style>").expect("a style ends");
            assert!(!style.contains('<'));
            pieces.push(Piece::Close("style"));
            rest = after;
        }
    }
    pieces.push(Piece::Text(rest));
    pieces
}

/// Fails where tags do not balance, an attribute is not quoted, or a text has a bare `&`.
pub fn check_markup(page: &str) {
    let mut open = Vec::new();
    for piece in pieces(page) {
        match piece {
            Piece::Open { name, attributes, closed } => {
                check_attributes(name, attributes);
                if !closed && !VOID.contains(&name) {
                    open.push(name);
                }
            }
            Piece::Close(name) => assert_eq!(open.pop(), Some(name), "</{name}> closes something else"),
            Piece::Text(text) => check_references(text),
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
}

fn check_attributes(name: &str, attributes: &str) {
    let mut rest = attributes.trim();
    while !rest.is_empty() {
        let (attribute, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("<{name} {rest}>"));
        let plain = attribute.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        assert!(plain && !attribute.starts_with("on"), "<{name} {attribute}>");
        let (value, after) = value.split_once('"').expect("a value ends");
        check_references(value);
        assert!(after.is_empty() || after.starts_with(' '), "<{name} … {after}>");
        rest = after.trim_start();
    }
}

fn check_references(text: &str) {
    for (at, _) in text.match_indices('&') {
        let end = text[at..].find(';').expect("a reference ends");
        let reference = &text[at + 1..at + end];
        assert!(reference.chars().all(|c| c.is_ascii_alphanumeric() || c == '#'), "&{reference};");
    }
}

/// What a reader sees: texts without tags, with references resolved and spaces as one.
pub fn text_of(page: &str) -> String {
    let mut text = String::new();
    for piece in pieces(page) {
        if let Piece::Text(piece) = piece {
            text.push_str(piece);
            text.push(' ');
        }
    }
    let references =
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#x27;", "'"), ("&#x2f;", "/"), ("&amp;", "&")];
    for (reference, character) in references {
        text = text.replace(reference, character);
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
