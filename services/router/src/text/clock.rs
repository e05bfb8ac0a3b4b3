//! `strftime` for chat templates that tell the model the date.
//!
//! The moment is an argument (seconds since 1970, UTC); nothing here reads a clock.

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment, taken apart.
struct Moment {
    year: i64,
    /// 1 to 12.
    month: usize,
    day: u32,
    /// 1 to 366.
    day_of_year: u32,
    /// 0 is Sunday.
    weekday: usize,
    hour: u32,
    minute: u32,
    second: u32,
}

impl Moment {
    fn at(unix: u64) -> Self {
        let (days, seconds) = ((unix / 86_400) as i64, (unix % 86_400) as u32);
        // Howard Hinnant's civil_from_days: years that begin in March make the leap day the last one.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let march_day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * march_day + 2) / 153;
        let day = (march_day - (153 * march_month + 2) / 5 + 1) as u32;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 } as usize;
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month - 1];
        Self {
            year,
            month,
            day,
            day_of_year: before + day + u32::from(leap && month > 2),
            weekday: (days + 4).rem_euclid(7) as usize,
            hour: seconds / 3_600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }
}

/// Formats the moment as Python's `strftime` does, in English and UTC. What is not known stays as it is.
pub(crate) fn strftime(format: &str, unix: u64) -> String {
    let now = Moment::at(unix);
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let bare = chars.next_if_eq(&'-').is_some(); // `%-d`: without the leading zero
        let number = |value: u32, width: usize| {
            if bare { value.to_string() } else { format!("{value:0width$}") }
        };
        let hour12 = match now.hour % 12 {
            0 => 12,
            hour => hour,
        };
        let text = match chars.next() {
            Some('Y') => now.year.to_string(),
            Some('y') => number(now.year.rem_euclid(100) as u32, 2),
            Some('m') => number(now.month as u32, 2),
            Some('d') => number(now.day, 2),
            Some('e') => format!("{:2}", now.day),
            Some('j') => number(now.day_of_year, 3),
            Some('H') => number(now.hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(now.minute, 2),
            Some('S') => number(now.second, 2),
            Some('p') => if now.hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('A') => DAYS[now.weekday].to_owned(),
            Some('a') => DAYS[now.weekday][..3].to_owned(),
            Some('B') => MONTHS[now.month - 1].to_owned(),
            Some('b' | 'h') => MONTHS[now.month - 1][..3].to_owned(),
            Some('F') => strftime("%Y-%m-%d", unix),
            Some('T' | 'X') => strftime("%H:%M:%S", unix),
            Some('D' | 'x') => strftime("%m/%d/%y", unix),
            Some('R') => strftime("%H:%M", unix),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if bare { "-" } else { "" }),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix, expected) in [
            (0, "1970-01-01 Thursday 001"),
            (951_782_400, "2000-02-29 Tuesday 060"),
            (1_709_251_199, "2024-02-29 Thursday 060"),
            (1_735_603_200, "2024-12-31 Tuesday 366"),
            (4_107_542_400, "2100-03-01 Monday 060"),
        ] {
            assert_eq!(strftime("%F %A %j", unix), expected);
        }
    }

    #[test]
    fn formats_of_the_templates_in_use() {
        let unix = 1_721_894_709; // 2024-07-25 08:05:09 UTC
        assert_eq!(strftime("%d %b %Y", unix), "25 Jul 2024"); // Llama 3.1
        assert_eq!(strftime("%B %-d, %Y %I:%M %p", unix), "July 25, 2024 08:05 AM");
        assert_eq!(strftime("100%% %Q %", unix), "100% %Q %");
    }
}
