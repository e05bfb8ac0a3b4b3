//! A tool call written as a JSON object, `{"name": …, "arguments": {…}}`, read character by character: the arguments are
//! given out as they come, as the model wrote them.

/// Where a JSON value ends.
#[derive(Clone, Debug, Default)]
pub(super) struct Walk {
    depth: u32,
    string: bool,
    escaped: bool,
    begun: bool,
}

/// What a character is to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Part of it.
    Inside,
    /// Its last one.
    Last,
    /// Not part of it: the value (a number, `true`) ended before.
    Past,
}

impl Walk {
    /// The next character of a value; the first one is not blank.
    pub(super) fn step(&mut self, c: char) -> Step {
        let begun = std::mem::replace(&mut self.begun, true);
        if self.string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.string = false;
                    if self.depth == 0 {
                        return Step::Last;
                    }
                }
                _ => {}
            }
            return Step::Inside;
        }
        match c {
            '"' => self.string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' if self.depth == 0 => return Step::Past,
            '}' | ']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Step::Last;
                }
            }
            ',' if self.depth == 0 => return Step::Past,
            c if self.depth == 0 && begun && c.is_whitespace() => return Step::Past,
            _ => {}
        }
        Step::Inside
    }
}

/// What reading a character brought.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Read {
    /// The tool's name.
    pub(super) name: Option<String>,
    /// More of the arguments; never before the name.
    pub(super) arguments: String,
    /// How it stands.
    pub(super) status: Status,
}

/// How reading stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Status {
    /// There is more to come.
    #[default]
    Open,
    /// The object has ended, and it was a call.
    Whole,
    /// It is no call.
    Wrong,
}

/// Reads one call. The object's `{` has been read already.
#[derive(Clone, Debug, Default)]
pub(super) struct Object {
    state: State,
    named: bool,
    /// The arguments so far, while the name is not known or they are not an object.
    kept: String,
    told_arguments: bool,
}

#[derive(Clone, Debug, Default)]
enum State {
    #[default]
    Key,
    InKey(String, bool),
    Colon(Field),
    Value(Field),
    InValue(Field, Walk, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

impl Object {
    /// The next character.
    pub(super) fn step(&mut self, c: char) -> Read {
        let mut read = Read::default();
        match std::mem::take(&mut self.state) {
            State::Key => match c {
                '"' => self.state = State::InKey(String::new(), false),
                '}' => self.end(&mut read),
                c if c == ',' || c.is_whitespace() => {}
                _ => read.status = Status::Wrong,
            },
            State::InKey(mut key, escaped) => match c {
                '"' if !escaped => {
                    self.state = State::Colon(match key.as_str() {
                        "name" => Field::Name,
                        "arguments" | "parameters" => Field::Arguments,
                        _ => Field::Other,
                    });
                }
                c => {
                    key.push(c);
                    self.state = State::InKey(key, c == '\\' && !escaped);
                }
            },
            State::Colon(field) => match c {
                ':' => self.state = State::Value(field),
                c if c.is_whitespace() => self.state = State::Colon(field),
                _ => read.status = Status::Wrong,
            },
            State::Value(field) if c.is_whitespace() => self.state = State::Value(field),
            // A second set of arguments is nobody's.
            State::Value(Field::Arguments) if self.told_arguments => {
                self.value(Field::Other, Walk::default(), String::new(), c, &mut read);
            }
            State::Value(field) => self.value(field, Walk::default(), String::new(), c, &mut read),
            State::InValue(field, walk, text) => self.value(field, walk, text, c, &mut read),
        }
        read
    }

    fn value(&mut self, field: Field, mut walk: Walk, mut text: String, c: char, read: &mut Read) {
        let step = walk.step(c);
        if step != Step::Past {
            let streamed =
                field == Field::Arguments && self.named && (c == '{' && text.is_empty() || self.told_arguments);
            match field {
                Field::Arguments if streamed => {
                    self.told_arguments = true;
                    read.arguments.push(c);
                }
                Field::Arguments | Field::Name => text.push(c),
                Field::Other => {}
            }
        }
        match step {
            Step::Inside => self.state = State::InValue(field, walk, text),
            Step::Last => self.had(field, text, read),
            Step::Past => {
                self.had(field, text, read);
                if read.status == Status::Open {
                    let rest = self.step(c);
                    read.arguments.push_str(&rest.arguments);
                    read.status = rest.status;
                }
            }
        }
    }

    /// A value has ended.
    fn had(&mut self, field: Field, text: String, read: &mut Read) {
        match field {
            Field::Name => match serde_json::from_str::<String>(&text) {
                Ok(name) if !name.is_empty() && !self.named => {
                    self.named = true;
                    read.name = Some(name);
                    if !self.kept.is_empty() {
                        read.arguments = std::mem::take(&mut self.kept);
                        self.told_arguments = true;
                    }
                }
                _ => read.status = Status::Wrong,
            },
            Field::Arguments if self.told_arguments => {}
            Field::Arguments => match as_object(text) {
                Some(text) if self.named => {
                    read.arguments = text;
                    self.told_arguments = true;
                }
                Some(text) => self.kept = text,
                None => read.status = Status::Wrong,
            },
            Field::Other => {}
        }
    }

    fn end(&mut self, read: &mut Read) {
        if !self.named {
            read.status = Status::Wrong;
            return;
        }
        if !self.told_arguments {
            read.arguments.push_str("{}");
        }
        read.status = Status::Whole;
    }
}

/// Arguments as the text of an object: some models write that text as a string, or `null` for none.
fn as_object(text: String) -> Option<String> {
    match text.chars().next()? {
        '{' => Some(text),
        '"' => serde_json::from_str::<String>(&text).ok().filter(|inner| inner.trim_start().starts_with('{')),
        _ => (text == "null").then(|| "{}".to_owned()),
    }
}
