//! A picture of a report: how long first tokens took, and how many requests there were over time, by policy.
//!
//! SVG, written by hand: no scripts, no fonts but the viewer's own, readable on a light page and on a dark one as it brings its
//! own ground. All text is escaped: names of traces come from outside.

use std::fmt::Write;

use crate::report::Report;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 400.0;
/// Told apart also by who sees no red or no green (Okabe, Ito 2008).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const GREY: &str = "#606060";

/// One of the pictures.
struct Panel {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
    x: Scale,
    y: Scale,
}

/// From values to places.
#[derive(Clone, Copy)]
struct Scale {
    from: f64,
    to: f64,
    log: bool,
}

impl Scale {
    fn share(self, value: f64) -> f64 {
        let place = |value: f64| if self.log { value.max(1e-12).ln() } else { value };
        let (from, to) = (place(self.from), place(self.to));
        ((place(value) - from) / (to - from)).clamp(0.0, 1.0)
    }

    /// Round values in it.
    fn ticks(self) -> Vec<f64> {
        if self.log {
            let tens = (self.from.log10().floor() as i32)..=(self.to.log10().ceil() as i32);
            let all = tens.flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
            let all: Vec<f64> = all.filter(|tick| (self.from..=self.to).contains(tick)).collect();
            let few = |tick: &f64| all.len() <= 8 || (tick.log10() - tick.log10().round()).abs() < 1e-9;
            return all.iter().copied().filter(few).collect();
        }
        let rough = (self.to - self.from) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= rough * 0.999);
        let step = step.unwrap_or(rough);
        (0..=10).map(|at| self.from + f64::from(at) * step).filter(|tick| *tick <= self.to * 1.0001).collect()
    }
}

impl Panel {
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.left + self.x.share(x) * self.width, self.top + (1.0 - self.y.share(y)) * self.height)
    }

    fn frame(&self, svg: &mut String, title: &str, x_name: &str, y_label: impl Fn(f64) -> String) {
        let Self { left, top, width, height, .. } = *self;
        text(svg, left, top - 12.0, "start", "#202020", 14, title);
        for tick in self.x.ticks() {
            let (x, _) = self.place((tick, self.y.from));
            line(svg, (x, top), (x, top + height), "#e4e4e4");
            text(svg, x, top + height + 17.0, "middle", GREY, 12, &number(tick));
        }
        for tick in self.y.ticks() {
            let (_, y) = self.place((self.x.from, tick));
            line(svg, (left, y), (left + width, y), "#e4e4e4");
            text(svg, left - 6.0, y + 4.0, "end", GREY, 12, &y_label(tick));
        }
        line(svg, (left, top + height), (left + width, top + height), GREY);
        line(svg, (left, top), (left, top + height), GREY);
        text(svg, left + width / 2.0, top + height + 36.0, "middle", GREY, 12, x_name);
    }

    fn curve(&self, svg: &mut String, points: &[(f64, f64)], colour: &str, dashed: bool) {
        let dash = if dashed { r#" stroke-dasharray="5 4""# } else { "" };
        let _ = write!(svg, r#"<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points=""#);
        for &point in points {
            let (x, y) = self.place(point);
            let _ = write!(svg, "{x:.1},{y:.1} ");
        }
        svg.push_str("\"/>\n");
    }
}

/// The picture.
pub fn svg(report: &Report) -> String {
    let mut svg = String::new();
    let rows: Vec<_> = report.rows.iter().zip(COLOURS.iter().cycle()).collect();
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">
<title>{}</title>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##,
        escape(&format!("kvasir-simulate {}: time to the first token and load by policy", report.trace))
    );
    let head = format!(
        "{}: {} requests in {:.0} s, {} prefill + {} decode workers",
        report.trace, report.sent.requests, report.sent.seconds, report.plan.prefill, report.plan.decode
    );
    text(&mut svg, 60.0, 26.0, "start", "#202020", 16, &head);

    let ttft = || rows.iter().flat_map(|(row, _)| row.curves.ttft.iter().map(|point| point.0));
    let fastest = ttft().fold(f64::INFINITY, f64::min).clamp(1e-3, 1e6);
    let slowest = ttft().fold(0.0, f64::max).max(fastest * 10.0);
    let waits = Panel {
        left: 60.0,
        top: 76.0,
        width: 380.0,
        height: 240.0,
        x: Scale { from: fastest, to: slowest, log: true },
        y: Scale { from: 0.0, to: 1.0, log: false },
    };
    waits.frame(&mut svg, "first token within … (by the names: mean)", "seconds", |share| {
        format!("{:.0} %", share * 100.0)
    });
    for (row, colour) in &rows {
        waits.curve(&mut svg, &row.curves.ttft, colour, false);
    }

    let over_time = || rows.iter().flat_map(|(row, _)| row.curves.waiting.iter().chain(&row.curves.answering));
    let most = over_time().map(|point| point.1).fold(1.0, f64::max);
    let last = over_time().map(|point| point.0).fold(1.0, f64::max);
    let load = Panel {
        left: 530.0,
        top: 76.0,
        width: 400.0,
        height: 240.0,
        x: Scale { from: 0.0, to: last, log: false },
        y: Scale { from: 0.0, to: most, log: false },
    };
    let title = "waiting for a first token (lines), answered (dashes)";
    load.frame(&mut svg, title, "seconds", number);
    for (row, colour) in &rows {
        load.curve(&mut svg, &row.curves.answering, colour, true);
        load.curve(&mut svg, &row.curves.waiting, colour, false);
    }

    for (at, (row, colour)) in rows.iter().enumerate() {
        let (x, y) = (60.0 + at as f64 * 175.0, HEIGHT - 20.0);
        let _ = writeln!(svg, r#"<rect x="{x}" y="{}" width="22" height="4" fill="{colour}"/>"#, y - 6.0);
        let label = format!("{}: {}", row.policy, short_ms(row.ttft_ms.mean));
        text(&mut svg, x + 28.0, y, "start", "#202020", 12, &label);
    }
    svg.push_str("</svg>\n");
    svg
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, colour: &str, size: u32, what: &str) {
    let what = escape(what);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{what}</text>"#
    );
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}"/>"#);
}

/// Text as XML has it; characters that XML has no place for are left out.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            character if character.is_control() || matches!(character, '\u{fffe}' | '\u{ffff}') => {}
            character => escaped.push(character),
        }
    }
    escaped
}

fn number(value: f64) -> String {
    let text = if value.abs() >= 1.0 || value == 0.0 { format!("{value:.1}") } else { format!("{value:.4}") };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn short_ms(ms: f64) -> String {
    if ms >= 1000.0 { format!("{:.1} s", ms / 1e3) } else { format!("{ms:.0} ms") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_outside_stay_text() {
        assert_eq!(escape("a<b>&\"c\"\u{1}\n\u{ffff}é"), "a&lt;b&gt;&amp;&quot;c&quot;é");
    }

    #[test]
    fn ticks_are_few_round_and_inside() {
        for scale in [
            Scale { from: 0.0, to: 1.0, log: false },
            Scale { from: 0.0, to: 3599.0, log: false },
            Scale { from: 0.003, to: 812.0, log: true },
            Scale { from: 0.2, to: 3.0, log: true },
        ] {
            let ticks = scale.ticks();
            assert!((2..=9).contains(&ticks.len()), "{ticks:?}");
            assert!(ticks.iter().all(|tick| (scale.from..=scale.to * 1.0001).contains(tick)), "{ticks:?}");
        }
        assert_eq!([number(0.0), number(100.0), number(0.05), number(2.5)], ["0", "100", "0.05", "2.5"]);
    }
}
