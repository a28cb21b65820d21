//! The Table view: the columns of each kind and the cells of a row.
//!
//! Pure: what depends on the time takes it as an argument. Upstream: pkg/printers/internalversion.

mod network;
mod object;
mod pods;
mod policy;
mod storage;
mod workloads;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::Kind;
use object::Printed;
pub use object::human_duration;

/// One column of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    pub name: &'static str,
    /// `string`, `integer`, `boolean` or `date`.
    pub ty: &'static str,
    /// `name` for the column that names the object, else empty.
    pub format: &'static str,
    /// Shown only with `-o wide`; sent all the same.
    pub wide: bool,
}

/// How a kind is shown.
#[derive(Debug)]
pub struct View {
    group: &'static str,
    kind: &'static str,
    pub columns: &'static [Column],
    cells: fn(&Printed) -> Vec<Value>,
}

/// One object's row, but for the `object` that goes with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// As many as there are columns.
    pub cells: Vec<Value>,
    /// Says of an object that its work is done.
    pub conditions: Vec<Value>,
}

/// How objects of `kind` are shown; kinds without a view of their own show name and creation time.
pub fn view(kind: &Kind) -> &'static View {
    let views = [pods::VIEWS, workloads::VIEWS, network::VIEWS, storage::VIEWS, policy::VIEWS];
    let mut all = views.into_iter().flatten();
    all.find(|v| v.group == kind.group && v.kind == kind.kind).unwrap_or(&PLAIN)
}

impl View {
    /// The row of one object at the time `now`.
    pub fn row(&self, object: &Value, now: Timestamp) -> Row {
        let printed = Printed { value: object, now };
        let pod = self.kind == "Pod" && self.group.is_empty();
        let conditions = if pod { pods::conditions(&printed) } else { Vec::new() };
        Row { cells: (self.cells)(&printed), conditions }
    }

    /// `columnDefinitions` of a Table.
    pub fn definitions(&self) -> Value {
        let definition = |c: &Column| json!({ "name": c.name, "type": c.ty, "format": c.format, "description": "", "priority": i32::from(c.wide) });
        self.columns.iter().map(definition).collect()
    }
}

static PLAIN: View = View {
    group: "",
    kind: "",
    columns: &[NAME, Column { name: "Created At", ty: "date", format: "", wide: false }],
    cells: |o| vec![o.name(), o.str("metadata.creationTimestamp").into()],
};

const NAME: Column = Column { name: "Name", ty: "string", format: "name", wide: false };
const AGE: Column = text("Age");

const fn text(name: &'static str) -> Column {
    Column { name, ty: "string", format: "", wide: false }
}

const fn wide(name: &'static str) -> Column {
    Column { name, ty: "string", format: "", wide: true }
}

const fn integer(name: &'static str) -> Column {
    Column { name, ty: "integer", format: "", wide: false }
}

const fn boolean(name: &'static str) -> Column {
    Column { name, ty: "boolean", format: "", wide: false }
}

/// A list of cells from whatever makes a JSON value.
macro_rules! cells {
    ($($cell:expr),* $(,)?) => { vec![$(serde_json::Value::from($cell)),*] };
}
use cells;

#[cfg(test)]
mod tests;
