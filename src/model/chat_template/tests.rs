//! Golden chats, message normalisation, bounds and errors.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &SpecialTokens::default()).unwrap()
}

fn render(source: &str) -> Result<String, ChatTemplateError> {
    template(source).render(&json!([{ "role": "user", "content": "Hi" }]), &ChatOptions::default())
}

fn refused(source: &str) -> String {
    match ChatTemplate::new(source, &SpecialTokens::default()).and_then(|template| {
        template.render(&json!([{ "role": "user", "content": "Hi" }]), &ChatOptions::default())
    }) {
        Ok(text) => panic!("{source:?} renders {} bytes", text.len()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn golden_chats_render() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for family in ["llama", "llama-tied", "mistral", "phi3", "qwen2", "qwen3"] {
        let case = golden.join(family);
        let forward: Value = serde_json::from_slice(&fs::read(case.join("forward.json")).unwrap()).unwrap();
        let tokenizer = Tokenizer::read(case.join("model")).unwrap();
        let template = ChatTemplate::from_tokenizer(&tokenizer).unwrap().unwrap();
        let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
        let text = template.render(&forward["chat"]["messages"], &options).unwrap();
        assert_eq!(text, forward["chat"]["text"].as_str().unwrap(), "{family}");
        let ids: Vec<u32> = serde_json::from_value(forward["chat"]["input_ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{family}");
    }
}

#[test]
fn is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<ChatTemplate>();
}

#[test]
fn parts_are_joined_for_a_template_that_reads_strings() {
    let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": "one" }, { "type": "text", "text": "two" }] }]);
    let strings = template("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}");
    assert_eq!(strings.render(&parts, &ChatOptions::default()).unwrap(), "user: one\ntwo");
    let printed = template("{% for m in messages %}{{ m.content }}{% endfor %}");
    assert_eq!(printed.render(&parts, &ChatOptions::default()).unwrap(), "one\ntwo");
    let lists =
        template("{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}");
    assert_eq!(lists.render(&parts, &ChatOptions::default()).unwrap(), "[one][two]");
    let string = json!([{ "role": "user", "content": "one" }]);
    assert_eq!(lists.render(&string, &ChatOptions::default()).unwrap(), "[one]");
}

#[test]
fn messages_are_normalised_as_transformers_and_vllm_do() {
    let shown = template("{{ messages|tojson }}");
    let show = |messages: Value| shown.render(&messages, &ChatOptions::default()).unwrap();
    assert_eq!(show(json!([{ "role": "a", "content": null, "name": null }])), r#"[{"role": "a"}]"#);
    assert_eq!(
        show(
            json!([{ "role": "a", "tool_calls": [{ "function": { "name": "f", "arguments": "{\"x\": [1]}" } }] }])
        ),
        r#"[{"role": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1]}}}]}]"#
    );
    assert_eq!(
        show(json!([{ "role": "a", "content": "c", "reasoning": "r" }])),
        r#"[{"role": "a", "content": "c", "reasoning": "r", "thinking": "r", "reasoning_content": "r"}]"#
    );
}

#[test]
fn bad_messages_name_the_field() {
    let plain = template("{{ messages[0].content }}");
    let text = |content: Value| json!([{ "role": "user", "content": content }]);
    for (messages, wanted) in [
        (json!([]), "messages is empty"),
        (json!("hi"), "messages is \"hi\""),
        (json!(["hi"]), "messages[0] is \"hi\""),
        (json!([{ "content": "x" }]), "messages[0].role is missing"),
        (text(json!(3)), "messages[0].content is 3"),
        (
            text(json!([{ "type": "image_url", "image_url": {} }])),
            "messages[0].content[0].type is \"image_url\"",
        ),
        (text(json!([{ "type": "text" }])), "messages[0].content[0].text is missing"),
        (json!([{ "role": "a", "tool_calls": {} }]), "messages[0].tool_calls is an object"),
        (
            json!([{ "role": "a", "tool_calls": [{ "function": { "arguments": "[" } }] }]),
            ".function.arguments",
        ),
    ] {
        let error = plain.render(&messages, &ChatOptions::default()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error:?} does not say {wanted:?}");
    }
}

#[test]
fn errors_name_file_and_line() {
    let source = |name: &str, source: &str| ChatTemplateSource {
        name: name.to_owned(),
        origin: "chat_template.jinja".to_owned(),
        source: source.to_owned(),
    };
    let tokens = SpecialTokens::default();
    let syntax = ChatTemplate::from_sources(&[source("default", "a\n\n{% frob %}")], &tokens).err().unwrap();
    assert!(syntax.to_string().starts_with("chat_template.jinja, line 3: syntax error"), "{syntax}");
    let messages = json!([{ "role": "user", "content": "x" }]);
    let failing =
        ChatTemplate::from_sources(&[source("default", "\n{% set x = 1 %}\n{{ x + 'y' }}")], &tokens)
            .unwrap();
    let error = failing.render(&messages, &ChatOptions::default()).unwrap_err();
    assert!(error.to_string().starts_with("chat_template.jinja, line 3: "), "{error}");
    let raising = ChatTemplate::from_sources(
        &[source(
            "default",
            "{% macro f() %}\n{{ raise_exception('roles must alternate') }}{% endmacro %}{{ f() }}",
        )],
        &tokens,
    )
    .unwrap();
    let error = raising.render(&messages, &ChatOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "roles must alternate (chat_template.jinja, line 2)");
    let nameless = ChatTemplate::from_sources(&[source("rag", "x")], &tokens).err().unwrap();
    assert_eq!(nameless.to_string(), "the model has no default chat template; it has rag");
}

#[test]
fn tools_pick_the_tool_template() {
    let named =
        |name: &str| ChatTemplateSource { name: name.into(), origin: name.into(), source: name.into() };
    let both = ChatTemplate::from_sources(&[named("default"), named("tool_use")], &SpecialTokens::default())
        .unwrap();
    let messages = json!([{ "role": "user", "content": "x" }]);
    let with = ChatOptions { tools: Some(json!([])), ..ChatOptions::default() };
    assert_eq!(both.render(&messages, &ChatOptions::default()).unwrap(), "default");
    assert_eq!(both.render(&messages, &with).unwrap(), "tool_use");
}

#[test]
fn the_date_is_printed_as_strftime_does() {
    let time = jiff::civil::date(2026, 3, 5).at(7, 8, 9, 0).to_zoned(jiff::tz::TimeZone::UTC).unwrap();
    let show = |format: &str| functions::strftime(format, &time).unwrap();
    assert_eq!(show("%d %b %Y"), "05 Mar 2026");
    assert_eq!(show("%A, %B %-d, %Y %H:%M:%S %j %y %p %%"), "Thursday, March 5, 2026 07:08:09 064 26 AM %");
    assert!(functions::strftime("%Q%", &time).is_err());
    let year = render("{{ strftime_now('%Y') }}").unwrap();
    assert!(year.parse::<i32>().unwrap() >= 2025);
}

#[test]
fn templates_that_run_away_end_with_an_error() {
    let started = Instant::now();
    let work = "exceeds its limit on work";
    let cases = [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", work),
        (
            "{% for a in range(99999) %}{% for b in range(9999) %}{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
            work,
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "exceeds its limit on recursion"),
        ("{{ 'x' * 9999999999 }}", work),
        ("{% set x = 'x' * 9999999 %}{{ x.replace('x', x) }}", work),
        ("{% set x = 'x' * 9999999 %}{{ x|replace('x', x) }}", work),
        ("{% set x = 'x' * 9999999 %}{{ x.join(range(99999)|map('string')|list) }}", work),
        ("{% set x = 'x' * 9999999 %}{{ range(99999)|join(x) }}", work),
        ("{{ (',' * 60000000).split(',')|length }}", work),
        ("{% set x = 'x' * 9999999 %}{{ [x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x]|tojson }}", work),
        ("{{ '{:>4000000000}'.format('x') }}", "over the largest width"),
        ("{{ '%4000000000d'|format(1) }}", ""),
        ("{{ 'x'.center(4000000000) }}", "over the largest"),
        ("{{ 'a\nb'|indent(4000000000) }}", ""),
        ("{{ [1]|tojson(indent=4000000000) }}", "indent"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            work,
        ),
        ("{% set x = 'x' * 9000000 %}{{ x }}{{ x }}{{ x }}{{ x }}", "exceeds its limit on rendered text"),
        ("{{ 10 ** 10 ** 10 }}", ""),
    ];
    for (source, wanted) in cases {
        let error = refused(source);
        assert!(error.contains(wanted), "{source}: {error}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

/// Values and syntax trees are walked by recursion: none may get deep enough to overflow a thread's stack.
#[test]
fn nothing_nests_without_end() {
    let chain = |before: &str, link: &str, after: &str, times: usize| {
        format!("{{{{ {before}{}{after} }}}}", link.repeat(times))
    };
    let grow = |start: &str, step: &str| {
        format!(
            "{{% set ns = namespace(x={start}) %}}{{% for i in range(90000) %}}{{% set ns.x = {step} %}}{{% endfor %}}\
             {{{{ ns.x }}}}{{{{ ns.x == ns.x }}}}"
        )
    };
    let nested = |inside: &str| format!("{}{inside}{}", "[".repeat(60), "]".repeat(60));
    for refused in [
        grow("[]", "[ns.x]"),
        grow("[]", "{'a': ns.x}"),
        grow("[1]", "ns.x|batch(1)"),
        grow("[1]", "ns.x|zip(ns.x)"),
        grow("[1]", "dict(a=ns.x).values()"),
        grow("[1]", "[ns.x[0:]]"),
        "{% set ns = namespace(x=0) %}{%- set ns.x = {'a': [ns]} -%}{{ ns }}".to_owned(),
        "{% set ns = namespace() %}{%set(ns.me)=ns%}{{ ns == ns.me }}".to_owned(),
        "{% set ns = namespace() %}{% with y = ns %}{% set y.x, y.z = 1, (y,) %}{% endwith %}{{ ns }}"
            .to_owned(),
        format!("{{% macro f(x) %}}{{{{ f({}) }}}}{{% endmacro %}}{{{{ f(0) }}}}", nested("x")),
        format!("{{% set x = 0 %}}{}{{{{ x }}}}", "{%set x=[x]%}".repeat(50_000)),
        chain("", "[", "", 100_000),
        chain("", "-", "1", 100_000),
        chain("1", "~1", "", 100_000),
        chain("x", ".a", "", 100_000),
        chain("1", "|abs", "", 100_000),
        chain("", "(", "", 900),
        format!("{}1{}", "{%if 1%}".repeat(20_000), "{%endif%}".repeat(20_000)),
        format!("{{% if 1 %}}{}{{% endif %}}", "{%elif 1%}".repeat(20_000)),
    ] {
        let outcome = ChatTemplate::new(&refused, &SpecialTokens::default())
            .and_then(|template| template.render(&json!([{ "role": "user" }]), &ChatOptions::default()));
        assert!(outcome.is_err(), "{}", refused.chars().take(80).collect::<String>());
    }
    // Long, but within the limits.
    let brackets = |inside: &str| format!("{}{inside}{}", "[".repeat(60), "]".repeat(60));
    for accepted in [
        format!(
            "{{% macro f(x, n) %}}{{{{ f({}, n + 1) if n < 23 else x ~ x|string ~ (x == x) }}}}{{% endmacro %}}{{{{ f(0, 0) }}}}",
            brackets("x")
        ),
        grow("[1, 2]", "ns.x[0:]"),
        grow("[1, 2]", "ns.x|reverse"),
        chain("", "-", "1", 900),
        chain("1", "~1", "", 450),
        chain("1", "|abs", "", 450),
        chain("1", " if 1 else 1", "", 240),
        chain("1", " is odd", "", 450),
        format!("{{% if 1 %}}{}{{% endif %}}", "{%elif 1%}".repeat(499)),
    ] {
        render(&accepted).unwrap();
    }
}

#[test]
fn generation_tags_keep_their_lines_and_whitespace_control() {
    let marked = "a\n  {% generation %}\nb{{ x }}\n  {%- endgeneration -%}\n\nc";
    let plain = "a\n  {% if true %}\nb{{ x }}\n  {%- endif -%}\n\nc";
    assert_eq!(render(marked).unwrap(), render(plain).unwrap());
    assert!(refused("{% generation %}\n\n{{ 1 + 'a' }}{% endgeneration %}").contains("line 3"));
}

#[test]
fn large_chats_have_the_fuel_they_need() {
    let long = template(
        "{% for m in messages %}{% set c = m.content.strip().replace('a', 'b') | trim %}\
         {{ '<|' + m.role + '|>' + c + '<|end|>' }}{% endfor %}",
    );
    let messages: Value = (0..5000)
        .map(|index| json!({ "role": if index % 2 == 0 { "user" } else { "assistant" }, "content": "a ".repeat(1000) }))
        .collect();
    let text = long.render(&messages, &ChatOptions::default()).unwrap();
    assert!(text.len() > 9_000_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn arbitrary_templates_never_panic(source in prop_oneof![
        any::<String>(),
        prop::collection::vec(prop::sample::select(PIECES), 0..24).prop_map(|pieces| pieces.join(" ")),
        prop::collection::vec(prop::sample::select(PIECES), 0..24).prop_map(|pieces| pieces.concat()),
    ]) {
        if let Ok(template) = ChatTemplate::new(&source, &SpecialTokens::default()) {
            let _ = template.render(&json!([{ "role": "user", "content": "é 🙂" }]), &ChatOptions::default());
        }
    }

    #[test]
    fn arbitrary_messages_never_panic(content in any::<String>(), role in any::<String>()) {
        let plain = template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
        let text = plain.render(&json!([{ "role": role, "content": content }]), &ChatOptions::default()).unwrap();
        prop_assert_eq!(text, format!("{role}: {content}\n"));
    }

    /// Preparation only touches the tags it knows.
    #[test]
    fn text_without_tags_is_kept(text in "[^{\r]{0,60}") {
        prop_assert_eq!(source::prepare(&text).unwrap(), text);
    }
}

const PIECES: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{%-",
    "-%}",
    "{#",
    "#}",
    "for",
    "in",
    "endfor",
    "if",
    "endif",
    "set",
    "endset",
    "macro f(x)",
    "endmacro",
    "raw",
    "endraw",
    "generation",
    "endgeneration",
    "messages",
    "m",
    "ns",
    "namespace()",
    "ns.x",
    "=",
    "==",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ".",
    ",",
    "|",
    "'",
    "\"",
    "\\",
    "1",
    "-1",
    "0.5",
    "'é🙂'",
    "x",
    "[::-1]",
    "[1:]",
    "tojson",
    "trim",
    "length",
    "join",
    "format",
    "split(',')",
    ".strip()",
    ".items()",
    "is",
    "not",
    "defined",
    "string",
    "+",
    "~",
    "*",
    "//",
    "%",
    "**",
    "99999999",
    "range(9)",
    "loop.index",
    "f(1)",
    "{% set x = 1 %}",
    "{{ messages }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if x %}",
    "{% endif %}",
    "\n",
    "  ",
    "é",
    "\r\n",
    "recursive",
    "loop(m)",
    "{% generation %}",
    "{% endgeneration %}",
    "with",
    "endwith",
    "break",
    "continue",
    "include",
    "'default'",
    "extends",
];
