from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "DIRECTORY"  # where this file lies, or a name on the hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)

chat = [{"role": "user", "content": "How do I plant a bean?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
written = model.generate(**prompt)[0]
print(tokenizer.decode(written[prompt["input_ids"].shape[1] :], skip_special_tokens=True))
