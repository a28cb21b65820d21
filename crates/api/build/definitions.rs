//! Collects the schemas that the `k8s_openapi` crate describes, by definition name.

use std::collections::BTreeMap;

use k8s_openapi::schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Value, json};

/// Group, version and kind.
pub type Gvk = (String, String, String);

pub struct Collector {
    generator: SchemaGenerator,
    lists: BTreeMap<String, Value>,
    pub roots: BTreeMap<Gvk, String>,
}

impl Collector {
    pub fn new() -> Collector {
        let mut settings = SchemaSettings::draft2020_12();
        settings.definitions_path = "/definitions".into();
        settings.meta_schema = None;
        Collector { generator: settings.into_generator(), lists: BTreeMap::new(), roots: BTreeMap::new() }
    }

    /// A type that is part of the API without being an object of a group.
    pub fn plain<T: JsonSchema>(&mut self) -> String {
        self.generator.subschema_for::<T>();
        T::schema_name().into_owned()
    }

    /// A kind that requests or answers carry, but that is never listed.
    pub fn sent<T: JsonSchema + k8s_openapi::Resource>(&mut self) {
        let name = self.plain::<T>();
        self.root::<T>(T::KIND.to_owned(), name);
    }

    /// A kind with a list; the crate has one generic list type without a schema, so the schema is made here.
    pub fn stored<T: JsonSchema + k8s_openapi::Resource>(&mut self) {
        let name = self.plain::<T>();
        let list = json!({
            "description": format!("{}List is a collection of {} objects.", T::KIND, T::KIND),
            "type": "object",
            "properties": {
                "apiVersion": { "type": "string", "description": "The version of the schema that this list is written in." },
                "items": { "type": "array", "description": "The objects.", "items": { "$ref": format!("#/definitions/{name}") } },
                "kind": { "type": "string", "description": "The name of the type of this list." },
                "metadata": {
                    "$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta",
                    "description": "Standard list metadata.",
                },
            },
            "required": ["items"],
        });
        self.lists.insert(format!("{name}List"), list);
        self.root::<T>(format!("{}List", T::KIND), format!("{name}List"));
        self.root::<T>(T::KIND.to_owned(), name);
    }

    fn root<T: k8s_openapi::Resource>(&mut self, kind: String, name: String) {
        self.roots.insert((T::GROUP.to_owned(), T::VERSION.to_owned(), kind), name);
    }

    /// Every definition reached, by name, with references of the form `#/definitions/NAME`.
    pub fn finish(mut self) -> (BTreeMap<String, Value>, BTreeMap<Gvk, String>) {
        self.plain::<k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta>();
        let mut all = self.lists;
        all.extend(self.generator.take_definitions(true));
        (all, self.roots)
    }
}
